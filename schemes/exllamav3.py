"""exllamav3: every 32 channels behind a Hadamard matrix and cut into cells over their largest size, 2 to 8 bits.

Of 32 channels of a token and head, y = H x/sqrt(32) with Hadamard's matrix, s = max|y| in fp16, m = 2^(b-1):
c = floor(m y/s + m), at most 2m - 1, and y^ = s (c - m + 1/2)/m.  There is no level at 0, and the largest number itself
is read half a step too small.  Here s/m is what is stored, a power of two less.

Both sides have the same bits here; `exl3_4.with_(**{"keys.code.bits": 6})` stores keys in others.  Not here: the cubic
compander of the cells, which its fused kernels do not serve, and what it adds to s against blocks of zeros, whose scale
is 0 here.
"""

from kvdsl.scheme import Rotate, Scheme, Store, Uniform, per_token

exl3_4 = Scheme(
    both=Store(
        Uniform(4, grid="cells"),
        scale=per_token(channels=32, range="absmax"),
        transform=Rotate("hadamard", size=32),
    ),
    source="exllamav3, quantized cache",
)
exl3_2 = exl3_4.with_(bits=2)
exl3_3 = exl3_4.with_(bits=3)
exl3_5 = exl3_4.with_(bits=5)
exl3_6 = exl3_4.with_(bits=6)
exl3_7 = exl3_4.with_(bits=7)
exl3_8 = exl3_4.with_(bits=8)
