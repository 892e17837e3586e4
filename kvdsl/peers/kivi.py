"""KIVI's kernels: two products of a vector with packed matrices around a softmax, three launches in all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvdsl.bench import Size
from kvdsl.bench_cache import Numbers

from . import Decoded, Ready, missing

WORD = 32
MEND = "build github.com/jy-yuan/KIVI (pip install ./quant)"


@dataclass(frozen=True)
class Kivi:
    """kivi_gemv, without the copies that its Python makes of codes in every step, and without its exact window."""

    name: str
    bits: int
    group: int

    def why_not(self, size: Size) -> str | None:
        if (why := missing("kivi_gemv", MEND)) is not None:
            return why
        if size.head_dim % self.group:
            return f"multiples of {self.group} channels only"
        return f"multiples of {self.group} tokens only" if size.tokens % self.group else None

    def prepare(self, size: Size, normal: Numbers) -> Ready:
        from kivi_gemv import gemv_forward_cuda_outer_dim as product

        heads, tokens, channels = size.batch * size.kv_heads, size.tokens, size.head_dim
        query = normal(size.q_heads, 1).reshape(-1, 1, channels) * channels**-0.5
        keys = self._matrix(heads, tokens, channels, query.device)
        values = self._matrix(heads, channels, tokens, query.device)
        how = (self.bits, self.group, size.q_heads, size.kv_heads)

        def call() -> Tensor:
            scores: Tensor = product(query, *keys, *how)
            found: Tensor = product(scores.softmax(-1), *values, *how)
            return found

        def decoded(b: int) -> Decoded:
            which = slice(b * size.kv_heads, (b + 1) * size.kv_heads)
            own = query.view(size.batch, size.q_heads, channels)[b].double() * channels**0.5
            k, v = (self._numbers(*(x[which] for x in side)) for side in (keys, values))
            return Decoded(own, k, v.mT)

        read = sum(x.nbytes for side in (keys, values) for x in side)
        # It launches on the default stream, which no graph holds.
        return Ready(call, read, decoded, graph=False)

    def _matrix(self, heads: int, outer: int, inner: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Random codes, int32 (heads, outer / codes of a word, inner), and the scale and offset of each group."""
        words = (heads, outer * self.bits // WORD, inner)
        codes = torch.randint(-(2**31), 2**31 - 1, words, dtype=torch.int32, device=device)
        drawn = torch.rand(heads, outer // self.group, inner, device=device) + 0.5
        scales = (drawn * (0.3 if self.bits == 4 else 1.0)).half()
        return codes, scales, (scales * -((2**self.bits - 1) / 2)).half()

    def _numbers(self, codes: Tensor, scales: Tensor, offsets: Tensor) -> Tensor:
        """What a matrix stands for, (heads, outer, inner)."""
        each = [(codes >> self.bits * i) & (2**self.bits - 1) for i in range(WORD // self.bits)]
        found = torch.stack(each, 2).flatten(1, 2).float()
        wide = (x.float().repeat_interleave(self.group, 1) for x in (scales, offsets))
        scale, offset = wide
        return found * scale + offset


KIVI = (Kivi("KIVI int4", 4, 64), Kivi("KIVI int2", 2, 128))
