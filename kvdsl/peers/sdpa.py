"""PyTorch's own attention over float16 numbers: what everything is compared with."""

from __future__ import annotations

from dataclasses import dataclass

from torch.nn.functional import scaled_dot_product_attention

from kvdsl.bench import Size
from kvdsl.bench_cache import Numbers

from . import Decoded, Ready


@dataclass(frozen=True)
class Sdpa:
    """scaled_dot_product_attention.  The group is not folded into the query's length: that is slower where few
    sequences are long."""

    name: str = "SDPA fp16"
    bits: float = 16

    def why_not(self, size: Size) -> str | None:
        return None

    def prepare(self, size: Size, normal: Numbers) -> Ready:
        query = normal(size.q_heads, 1)
        keys, values = (normal(size.kv_heads, size.tokens) for _ in range(2))
        return Ready(
            lambda: scaled_dot_product_attention(query, keys, values, enable_gqa=True),
            keys.nbytes + values.nbytes,
            lambda b: Decoded(query[b, :, 0], keys[b], values[b]),
        )
