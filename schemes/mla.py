"""MLA: the record of multi-head latent attention, a latent vector and a key with rotary positions (DeepSeek-V2, -V3).

A key is 512 numbers c of the latent and 64 numbers r with positions, its value is c again: read twice, stored once.
mla_fp8: of 128 numbers of c s = max|c|/448 in fp32, e4m3(c/s); r in 16 bits. 656 bytes a token.
mla_nvfp4: of 16 numbers of c s = e4m3(max(max|c|/6, 2^-9)), e2m1(c/s); e4m3(r). 352 bytes a token.

Here scales stand in the order of their groups.  vLLM has that of group i at byte 8*(i mod 4) + i//4 of 32, for the sake
of its kernel alone.
"""

from kvdsl.scheme import Bands, Float, Scheme, Shared, Store, per_token

mla_fp8 = Scheme(
    keys=Store(Bands((Store(Float("e4m3"), scale=per_token(channels=128, dtype="fp32")), Store()), channels=(512, 64))),
    values=Store(Shared()),
    source="FlashMLA, fp8_ds_mla",
)
mla_nvfp4 = mla_fp8.with_(
    stores=(Store(Float("e2m1"), scale=per_token(channels=16, dtype="e4m3", floor=2.0**-9)), Store(Float("e4m3"))),
    source="vLLM, nvfp4_ds_mla",
)
