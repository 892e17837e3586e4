"""PolarQuant: keys as radius and angle of the pairs that RoPE turns (arXiv 2502.00527).

r = sqrt(x_i^2 + x_(i + d/2)^2), a = atan2(x_(i + d/2), x_i) in [0, 2 pi).  Of each pair r and a are coded in 4 bits
each, per block of 128 tokens: s = (max - min)/16, c = floor((y - min)/s), y^ = s*(c + 1/2) + min; s and min in fp16.
k^ = (r^ cos a^, r^ sin a^).  The newest 128 tokens are exact and leave together.  Values: 4 bits, a scale a token.
"""

from kvdsl.scheme import Polar, Recent, Scheme, Store, Uniform, per_channel, per_token

polar_pairs = Scheme(
    keys=Store(Uniform(4, grid="cells"), scale=per_channel(tokens=128), transform=Polar()),
    values=Store(Uniform(4), scale=per_token()),
    recent=Recent(128, "whole"),
    source="arXiv 2502.00527",
)
