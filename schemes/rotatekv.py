"""RotateKV: keys and values rotated head by head, then levels with an integer zero point (arXiv 2501.16383).

y = H x/sqrt(d), s = clip*(max - min)/(2^b - 1), z = round(-clip*min/s), c = clamp(round(y/s) + z), x^ = H s*(c - z)/
sqrt(d); s in fp16, clip 0.8 at 2 bits, else 1, one block a token and head.
Left out: keys are rotated four heads at once, ordered by calibrated sums and coded before RoPE; here one head at a time
and after it, where an order within the one block changes nothing.  Tokens of massive activations are not kept exact.
The official step at 3 bits divides by 8, here by 7.
"""

from kvdsl.scheme import Rotate, Scheme, Store, Uniform, per_token

rotatekv4 = Scheme(
    both=Store(Uniform(4), scale=per_token(zero="point"), transform=Rotate("hadamard")),
    prefill="stored",
    source="arXiv 2501.16383, one head at a time, after RoPE",
)
rotatekv3 = rotatekv4.with_(bits=3)
rotatekv2 = rotatekv4.with_(bits=2, **{"keys.scale.clip": 0.8, "values.scale.clip": 0.8})
