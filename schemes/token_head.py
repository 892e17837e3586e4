"""One fp32 scale for each token and kv head (vLLM, kv_cache_dtype int8_per_token_head and int4_per_token_head).

int8: s = max|x|/127, x^ = s*c with c in -127..127.
int4: y = H diag(signs) x/sqrt(d), a random Hadamard matrix; s = (hi - lo)/15 over a range of y that holds 0,
y^ = s*(c - z), and the zero point z = round(-lo/s) stands in the lowest four mantissa bits of s, so that it costs
nothing.
"""

from kvdsl.scheme import Rotate, Scheme, Store, Uniform, per_token

int8_token_head = Scheme(
    both=Store(Uniform(8), scale=per_token(range="absmax", dtype="fp32")),
    source="vLLM, int8_per_token_head",
)
int4_token_head = Scheme(
    both=Store(
        Uniform(4),
        scale=per_token(dtype="fp32", zero="in_scale"),
        transform=Rotate("random_hadamard", seed=0),
    ),
    source="vLLM, int4_per_token_head",
)
