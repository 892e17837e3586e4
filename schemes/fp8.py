"""The 8-bit float e4m3 under an fp32 scale, one for a layer's side or one a token and head (vLLM, kv_cache_dtype fp8*),
or under a power of two for 32 channels (SGLang, mxfp8).

s = max|x|/448 over calibration data or over the token's head; c = e4m3(x/s), nearest even and saturating; x^ = s*c.
mxfp8: s = 2^ceil(log2(max|x|/448)), under which nothing saturates.  Its kernels code queries alike: mxfp8_queries.
"""

from kvdsl.scheme import Float, Scheme, Store, per_tensor, per_token

fp8_tensor = Scheme(
    both=Store(Float("e4m3"), scale=per_tensor(dtype="fp32", when="calibrated")),
    source="vLLM, fp8",
)
fp8_token_head = Scheme(
    both=Store(Float("e4m3"), scale=per_token(dtype="fp32")),
    source="vLLM, fp8_per_token_head",
)
mxfp8 = Scheme(
    both=Store(Float("e4m3"), scale=per_token(channels=32, dtype="e8m0", exponent="ceil")),
    source="SGLang, mxfp8",
)
mxfp8_queries = mxfp8.with_(queries=mxfp8.keys)
