"""Sequences alone and in batches of others, through caches that promise the same."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kvdsl.codegen import build
from kvdsl.kernels import Backend
from kvdsl.quantized_cache import QuantizedCache
from kvdsl.schemes import ALL
from kvdsl.shape import Shape

SCHEMES = ("token4", "kivi2", "quarot4", "fp16")
Q_HEADS = 4
SHAPE = Shape(64, 2, Q_HEADS)
CAPACITY = 512
LENGTHS = (173, 64, 7)
STEPS = 2


def alone_and_together(name: str, backend: Backend) -> Iterator[tuple[Tensor, Tensor]]:
    """Outputs, and log-sum-exps, of a prompt and a few steps: of each sequence alone, and of it in a batch, in which
    others are longer or shorter."""
    kernels = build(ALL[name], SHAPE, backend)
    generator = torch.Generator().manual_seed(5)
    batch = len(LENGTHS)

    def normal(heads: int, tokens: int) -> Tensor:
        return torch.randn(batch, heads, tokens, SHAPE.head_dim, generator=generator).half()

    steps = [
        (normal(Q_HEADS, queries), *(normal(SHAPE.kv_heads, new) for _ in range(2)))
        for queries, new in [(1, max(LENGTHS)), *[(1, 1)] * (STEPS - 1), (3, 3)]
    ]

    def run(rows: list[int]) -> list[tuple[Tensor, Tensor]]:
        cache = QuantizedCache(kernels, len(rows), device="cpu", capacity=CAPACITY, batch_invariant=True)
        found = []
        for number, (q, k, v) in enumerate(steps):
            counts = [LENGTHS[b] for b in rows] if not number else None
            width = max(counts) if counts else k.shape[2]
            new = (k[rows, :, -width:].contiguous(), v[rows, :, -width:].contiguous())
            found.append(cache.append_and_attend(q[rows], *new, counts=counts))
        return found

    together = run(list(range(batch)))
    pair = run([2, 0])
    for b in range(batch):
        for number, results in enumerate(run([b])):
            for one, many in zip(results, together[number], strict=True):
                yield one[0], many[b]
            for one, many in zip(results, pair[number], strict=True):
                if b != 1:
                    yield one[0], many[{2: 0, 0: 1}[b]]
