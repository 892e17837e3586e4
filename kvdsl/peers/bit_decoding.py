"""BitDecoding: int4 and int2 with a scale for each channel of 128 keys, and each token's values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kvdsl.bench import Size
from kvdsl.bench_cache import Numbers

from . import Ready, missing

GROUP = 128
BLOCK = 256  # tokens that its kernel takes at a time
MEND = "build github.com/DD-DuDa/BitDecoding (setup.py, with its CUTLASS submodule)"


@dataclass(frozen=True)
class BitDecoding:
    """kvcache_pack_int, then fwd_kvcache_int, over contiguous caches."""

    name: str
    bits: int

    def why_not(self, size: Size) -> str | None:
        if (why := missing("bit_decode", MEND)) is not None:
            return why
        if size.head_dim != 128:
            return "head_dim 128 only"
        return f"multiples of {BLOCK} tokens only" if size.tokens % BLOCK else None

    def prepare(self, size: Size, normal: Numbers) -> Ready:
        from bit_decode import fwd_kvcache_int, kvcache_pack_int

        batch, heads, tokens, channels = size.batch, size.kv_heads, size.tokens, size.head_dim
        query = normal(size.q_heads, 1).transpose(1, 2).contiguous()
        device, each = query.device, 16 // self.bits
        keys, values = (normal(heads, tokens).transpose(1, 2).contiguous() for _ in range(2))
        key_words = torch.zeros(batch, tokens // each, heads, channels, dtype=torch.uint16, device=device)
        key_scales = torch.zeros(batch, tokens // GROUP, heads, channels, device=device)
        value_words = torch.zeros(batch, tokens, heads, channels // each, dtype=torch.uint16, device=device)
        value_scales = torch.zeros(batch, channels // GROUP, heads, tokens, device=device)
        starts = torch.arange(batch + 1, dtype=torch.int32, device=device) * tokens
        packed = (key_words, key_scales, value_words, value_scales)
        how = ("k-channel", GROUP, self.bits)
        kvcache_pack_int(keys, key_words, key_scales, values, value_words, value_scales, None, starts, tokens, *how)

        def call() -> Any:
            return fwd_kvcache_int(query, *packed, None, channels**-0.5, *how)

        # What its words stand for is not unpacked here, so that its output is not checked.
        return Ready(call, sum(x.nbytes for x in packed))


BIT_DECODING = (BitDecoding("BitDecoding int4", 4), BitDecoding("BitDecoding int2", 2))
