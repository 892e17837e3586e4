"""QuaRot: keys and values rotated by Hadamard's matrix, then plain asymmetric levels (arXiv 2404.00456, section 4).

y = H x/sqrt(d), s = (max - min)/(2^b - 1), c = round((y - min)/s), x^ = H (s*c + min)/sqrt(d); s and min in fp16, one
block a token and head.  head_dim is a power of two.
"""

from kvdsl.scheme import Rotate, Scheme, Store, Uniform, per_token

quarot4 = Scheme(
    both=Store(Uniform(4), scale=per_token(), transform=Rotate("hadamard")),
    prefill="stored",
    source="arXiv 2404.00456, section 4",
)
quarot2 = quarot4.with_(bits=2)
