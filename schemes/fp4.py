"""The 4-bit float e2m1 in small blocks: MXFP4, SGLang's of 16 numbers and NVFP4.

mxfp4: of 32 channels s = 2^(floor(log2 max|x|) - 2), a byte; numbers beyond 6*s saturate.
nvfp4: of 16 channels s = e4m3(max|x|/6/S)*S with S = max|x|/(448*6) of calibration data, in fp32.
fp4_block16: of 16 channels s = 2^ceil(log2(max|x|/6)), under which nothing saturates; ties away from 0.
4over6: of each block either that s or 3/2 of it, so that the largest number is a 6 or a 4: whichever errs less.
c = e2m1(x/s), of the others nearest even; x^ = s*c.
"""

from kvdsl.scheme import Float, Scheme, Store, per_tensor, per_token

mxfp4 = Scheme(
    both=Store(Float("e2m1"), scale=per_token(channels=32, dtype="e8m0")),
    source="OCP, MX 1.0",
)
fp4_block16 = Scheme(
    both=Store(Float("e2m1", rounding="away"), scale=per_token(channels=16, dtype="e8m0", exponent="ceil")),
    source="SGLang, fp4_mx_block16",
)
nvfp4 = Scheme(
    both=Store(
        Float("e2m1"),
        scale=per_token(channels=16, dtype="e4m3", scale=per_tensor(dtype="fp32", when="calibrated")),
    ),
    source="NVIDIA, NVFP4",
)
nvfp4_4over6 = nvfp4.with_(clip=(1.0, 1.5), source="vLLM, nvfp4_4over6")
