"""An engine in small: blocks, requests that come in chunks and go, and one layer of random keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from kvdsl.codegen import build
from kvdsl.quantized_cache import QuantizedCache
from kvdsl.registry import load
from kvdsl.serving import Requests, ServedLayer, Slots, Step, served
from kvdsl.shape import Shape

SHAPE = Shape(64, 2, 4, dtype="fp32")
SCALING = 0.3
CPU = torch.device("cpu")


@dataclass
class Request:
    """Tokens of a request by a seed, how many of them are stored, and its blocks."""

    seed: int
    length: int = 0
    blocks: list[int] = field(default_factory=list)

    def drawn(self, end: int) -> tuple[Tensor, Tensor, Tensor]:
        """Query, keys and values (end, heads, D) of its tokens."""
        made = torch.Generator().manual_seed(self.seed)
        heads = (SHAPE.q_heads or 0, SHAPE.kv_heads, SHAPE.kv_heads)
        return tuple(torch.randn(999, h, SHAPE.head_dim, generator=made)[:end] for h in heads)  # type: ignore[return-value]


class Engine:
    """Blocks of one layer, stored and read by a scheme."""

    def __init__(self, name: str, requests: int = 4, blocks: int = 64, draft: int = 0) -> None:
        self.how = served(load(name))
        self.kernels = build(self.how.scheme, SHAPE, "torch")
        ring = self.how.block + draft
        self.layer = ServedLayer(self.how, self.kernels, self.made(), SCALING, 2 * requests, ring, CPU)
        self.slots, self.draft = Slots(2 * requests), draft
        self.pages = self.how.block // self.how.page_tokens
        self.pool = torch.randint(0, 99, (blocks * self.pages, self.kernels.page_bytes), dtype=torch.uint8)
        self.free = list(range(blocks - 1, 0, -1))

    def made(self) -> dict[str, Tensor]:
        """Parameters that a seed alone gives."""
        return QuantizedCache(self.kernels, 1, device="cpu").params

    def step(self, requests: Sequence[Request], counts: Sequence[int], *, wrong: int = 0) -> list[Tensor]:
        """Outputs (count, Hq, D) of the next tokens of each request; the last `wrong` of them turn out never to have
        been."""
        drawn = []
        for request, count in zip(requests, counts, strict=True):
            request.length += count
            while len(request.blocks) * self.how.block < request.length:
                request.blocks.append(self.free.pop())
            fresh = [x[-count:].clone() for x in request.drawn(request.length)]
            for x in fresh:
                x[count - wrong :] *= -3
            drawn.append(fresh)
        query, keys, values = (torch.cat(part) for part in zip(*drawn, strict=True))
        width = max(len(request.blocks) for request in requests)
        table = np.array([request.blocks + [0] * (width - len(request.blocks)) for request in requests])
        starts = np.cumsum([0, *counts])
        told = Requests(np.array([request.length for request in requests]), starts, table)
        step = Step.of(told, self.how, self.slots, self.layer.ring, CPU, self.draft)
        out = torch.full_like(query, torch.nan)
        self.layer.forward(query, keys, values, self.pool, step, out)
        for request in requests:
            request.length -= wrong
        return list(out.split(list(counts)))

    def alone(self, request: Request, end: int) -> Tensor:
        """The same by a cache of its own, block by block: outputs (end, Hq, D)."""
        cache = QuantizedCache(self.kernels, 1, device="cpu")
        query, keys, values = (x.transpose(0, 1)[None] for x in request.drawn(end))
        found, begin = [], 0
        while begin < end:
            stop = min(end, self.how.sinks + self.how.own_block(begin) + self.how.block)
            part = slice(begin, stop)
            out, _ = cache.append_and_attend(query[:, :, part], keys[:, :, part], values[:, :, part], scaling=SCALING)
            found.append(out[0].transpose(0, 1))
            begin = stop
        return torch.cat(found)
