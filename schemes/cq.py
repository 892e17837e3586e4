"""CQ: coupled quantization, neighbouring channels share the code of the nearest vector (arXiv 2405.03917).

Of a key R_t^-1 k, before RoPE, or a value v, c channels from channel i c on are one vector x; its code of b bits is the
n in 0..2^b - 1 with the least |x - v_n|^2, and x^ = v_n: b/c bits a number, and nothing beside it.  The 2^b vectors v_n
of a kv head and group i are those with the least sum of F |x - v_n|^2 over calibration data (k-means from k-means++, at
most 100 rounds), F = |dL/dx|^2 of the model's loss L, the sum of the Fisher information's diagonal over the group.
Kept in fp16 they are 2^b numbers a channel: of 8 bits 64 KiB a kv head and side of 128 channels.

<c>c<b>b is the paper's name for it.  The tables of the paper have no exact tokens; with the newest 32 in fp16 1 bit
loses little (`recent=Recent(32)`).
"""

from kvdsl.scheme import PreRope, Scheme, Store, Vectors

cq_2c8b = Scheme(
    keys=Store(Vectors(8, channels=2, weights="fisher"), transform=PreRope()),
    values=Store(Vectors(8, channels=2, weights="fisher")),
    source="arXiv 2405.03917, 4 bits a channel",
)
cq_4c8b = cq_2c8b.with_(channels=4, source="arXiv 2405.03917, 2 bits a channel")
cq_8c8b = cq_2c8b.with_(channels=8, source="arXiv 2405.03917, 1 bit a channel")
