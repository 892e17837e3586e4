"""`python tests/sanitized.py NAME`: every kernel of a scheme on a GPU, for compute-sanitizer to watch.

A ragged batch is packed, attended to token by token and by many queries at once, cropped, reordered, decoded, and where
the scheme allows it goes on in place.  Nothing is compared: that is what the laws do.
"""

from __future__ import annotations

import sys

import torch

import kvdsl
from kvdsl.codegen import build, build_tiers
from kvdsl.making import made
from kvdsl.params import ROPE
from kvdsl.quantized_cache import QuantizedCache
from kvdsl.rope import usual
from kvdsl.scheme import SIDES
from kvdsl.shape import Shape
from kvdsl.static_cache import StaticCache

SHAPE = Shape(128, kv_heads=2, q_heads=8)
TOKENS, STEPS = 300, 70


def numbers(heads: int, tokens: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, heads, tokens, SHAPE.head_dim, generator=generator).half()


def walked(name: str, device: str = "cuda") -> None:
    """All of it."""
    scheme = kvdsl.load(name)
    keys, values, queries = (numbers(heads, TOKENS, seed).to(device) for seed, heads in enumerate((2, 2, 8)))
    rope = {ROPE: usual(SHAPE.head_dim)} if scheme.keys.rope is not None else {}
    given = dict(params=rope, gradients=(keys, values))  # any derivatives will do
    params = rope | kvdsl.calibrate(scheme, keys, values, queries, **given)
    cache = made(scheme, SHAPE, 2, build, build_tiers, device=torch.device(device), params=params)
    at = 0
    for chunk in (150, 1, 1, 40, 1):
        span = slice(at, at + chunk)
        cache.append_and_attend(
            queries[:, :, span], keys[:, :, span], values[:, :, span], counts=(chunk, -(-chunk // 2))
        )
        at += chunk
    if isinstance(cache, QuantizedCache):
        cache.crop([cache.lengths[0] - 3, cache.lengths[1]])
        cache.reorder([1, 0])
    if isinstance(cache, QuantizedCache) and not rope:
        static = StaticCache(cache, TOKENS + STEPS)
        static.begin()
        for at in range(STEPS):
            span = slice(at, at + 1)
            static.step(queries[:, :, span], keys[:, :, span], values[:, :, span])
        static.settle()
    for side in SIDES:
        cache.dense(side).cpu()


if __name__ == "__main__":
    walked(sys.argv[1])
