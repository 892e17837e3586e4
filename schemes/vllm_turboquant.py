"""vLLM's presets after TurboQuant: keys from a table or in fp8, values on even levels (kv_cache_dtype turboquant_*).

Keys: y = H x/sqrt(d) with Hadamard's matrix, the nearest of the levels for the normal law of y over its root mean
square, and (nc, norm correction) s = |y| over the norm of the levels that were chosen, in fp16.  k8: e4m3 of the key.
Values: s = (max - min)/(2^b - 1), c = floor((x - min)/s + 1/2), x^ = s*c + min, one block a token and head.
The first and the last two layers stay exact.
"""

from kvdsl.scheme import Codebook, Float, Rotate, Scheme, Store, Uniform, per_token

EXACT = Scheme(both=Store(Float("fp16")))
LAYERS = {(0, 1, -2, -1): EXACT}

vllm_4bit_nc = Scheme(
    keys=Store(Codebook(4, "normal"), scale=per_token(refit="norm"), transform=Rotate("hadamard")),
    values=Store(Uniform(4, rounding="half_up"), scale=per_token()),
    layers=LAYERS,
    source="vLLM, turboquant_4bit_nc",
)
vllm_k3v4_nc = vllm_4bit_nc.with_(keys=vllm_4bit_nc.keys.with_(bits=3), source="vLLM, turboquant_k3v4_nc")
vllm_3bit_nc = vllm_4bit_nc.with_(bits=3, source="vLLM, turboquant_3bit_nc")
vllm_k8v4 = vllm_4bit_nc.with_(keys=Store(Float("e4m3")), source="vLLM, turboquant_k8v4")
