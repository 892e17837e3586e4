"""PolarQuant: keys as radius and angle of the pairs that RoPE turns (arXiv 2502.00527), and vectors as radii and angles
level by level (arXiv 2502.02617).

polar_pairs: r = sqrt(x_i^2 + x_(i + d/2)^2), a = atan2(x_(i + d/2), x_i) in [0, 2 pi).  Of each pair r and a are coded
in 4 bits each, per block of 128 tokens: s = (max - min)/16, c = floor((y - min)/s), y^ = s*(c + 1/2) + min; s and min
in fp16.  k^ = (r^ cos a^, r^ sin a^).  The newest 128 tokens are exact and leave together.  Values: 4 bits, a scale a
token.

polar: y = S x, S a random rotation; radii and angles of pairs, then of pairs of radii, four levels deep: 16 channels
are one radius in fp16, 8 angles of 4 bits (the whole circle in equal cells) and 4 + 2 + 1 angles in [0, pi/2] of 2 bits
(the best table for the density of sin(2a)^(2^(level - 1) - 1)).  Which channels are paired is a matter of S.
Left out: the paper keeps tokens that were generated exact; here they are coded as all others.
"""

from kvdsl.scheme import Bands, Codebook, Float, Polar, Recent, Rotate, Scheme, Store, Uniform, per_channel, per_token

polar_pairs = Scheme(
    keys=Store(Uniform(4, grid="cells"), scale=per_channel(tokens=128), transform=Polar()),
    values=Store(Uniform(4), scale=per_token()),
    recent=Recent(128, "whole"),
    source="arXiv 2502.00527",
)

radii, circle, quarter = Store(Float("fp16")), Store(Codebook(4, "angle")), Store(Codebook(2, "angle"))
polar = Scheme(
    both=Store(
        Bands((radii, circle, quarter, quarter, quarter)),
        transform=(Rotate("orthogonal", seed=0), Polar(levels=4)),
    ),
    prefill="stored",
    source="arXiv 2502.02617",
)
