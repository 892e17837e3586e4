"""RotateKV: keys before RoPE and values, rotated, then levels with an integer zero point (arXiv 2501.16383).

y = H x/sqrt(d), s = clip*(max - min)/(2^b - 1), z = round(-clip*min/s), c = clamp(round(y/s) + z), x^ = H s*(c - z)/
sqrt(d); s in fp16, clip 0.8 at 2 bits, else 1, one block a token and head.  Of keys x = R_t^-1 k, as they were before
RoPE.  The first token is exact.
The paper rotates the keys of four neighbouring heads at once, an outlier of one being shared out among all: so do
`rotatekv4_grouped`, `rotatekv3_grouped` and `rotatekv2_grouped`, for models whose kv heads are a multiple of four
(`kvdsl show kvdsl.schemes.rotatekv:rotatekv4_grouped`); a step then reads the keys of four heads for each.  The schemes
that fit any model rotate one head at a time.
Left out: the order of the channels of the four heads by calibrated sums, which decides what shares a block (given as
`params`, `keys.encode` and `keys.decode` may have it).  Of the tokens of massive activations, found in the hidden
states while a prompt is read, the first one of a sequence is kept exact, the others are not.  The official step at 3
bits divides by 8, here by 7.
"""

from kvdsl.scheme import PreRope, Rotate, Scheme, Sinks, Store, Uniform, per_token

rotatekv4 = Scheme(
    keys=Store(Uniform(4), scale=per_token(zero="point"), transform=(PreRope(), Rotate("hadamard"))),
    values=Store(Uniform(4), scale=per_token(zero="point"), transform=Rotate("hadamard")),
    sinks=Sinks(1),
    prefill="stored",
    source="arXiv 2501.16383, one head at a time",
)
rotatekv3 = rotatekv4.with_(bits=3)
rotatekv2 = rotatekv4.with_(bits=2, **{"keys.scale.clip": 0.8, "values.scale.clip": 0.8})

_FOUR = {"keys.transform": (PreRope(), Rotate("hadamard", heads=4)), "source": "arXiv 2501.16383"}
rotatekv4_grouped = rotatekv4.with_(**_FOUR)
rotatekv3_grouped = rotatekv3.with_(**_FOUR)
rotatekv2_grouped = rotatekv2.with_(**_FOUR)
