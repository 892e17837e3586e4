"""One fp32 scale for each token and kv head (vLLM, kv_cache_dtype int8_per_token_head and int4_per_token_head).

int8: s = max|x|/127, x^ = s*c with c in -127..127.
int4: y = H diag(signs) x/sqrt(d), a random Hadamard matrix; s = (hi - lo)/15 over a range of y that holds 0,
y^ = s*(c - z), and the zero point z = round(-lo/s) stands in the lowest four mantissa bits of s, so that it costs
nothing.

vLLM takes hi and lo as they are and holds z to 0..15, with c = round(y/s) away from 0, plus z: `int4_token_head_held`.
Where all numbers of a head have one sign, that is no zero point of theirs: they saturate, and a head of one number
everywhere is lost.  `int4_token_head` widens the range instead, for larger steps.  `int4_token_head_free` stores s in
fp16 with z beside it, any integer, in as many bits; it loses nothing by an offset.
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
int4_token_head_held = int4_token_head.with_(
    zero="held_in_scale", rounding="away", source="vLLM, int4_per_token_head as it is"
)
int4_token_head_free = int4_token_head.with_(
    zero="point", dtype="fp16", rounding="away", source="vLLM, int4_per_token_head with a zero point of its own"
)
