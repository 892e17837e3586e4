"""`python tests/walked.py NAME`: every kernel of a scheme on a GPU, for compute-sanitizer to watch.

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
CHUNKS, STEPS = (150, 1, 1, 40, 1), 70
NAMES = (
    "fp16", "token4", "kivi2", "kivi2_sinks", "int8_token_head", "fp8_token_head", "mxfp4", "nvfp4", "turboquant3",
    "iq4_nl", "kvtq", "qjl", "gear2", "kvquant3", "kitty", "polar", "quarot4", "skvq2", "zipcache",
)  # fmt: skip
"""One of every code, and of every way to store what a code leaves."""


def walked(
    name: str, shape: Shape = SHAPE, device: str = "cuda", chunks: tuple[int, ...] = CHUNKS, steps: int = STEPS
) -> None:
    """All of it."""
    scheme, tokens = kvdsl.load(name), sum(chunks) + steps
    heads = (shape.kv_heads, shape.kv_heads, shape.q_heads or shape.kv_heads)
    made_of = (numbers(count, tokens, shape.head_dim, seed) for seed, count in enumerate(heads))
    keys, values, queries = (x.to(device) for x in made_of)
    rope = {ROPE: usual(shape.head_dim)} if scheme.keys.rope is not None else {}
    given = dict(params=rope, gradients=(keys, values))  # any derivatives will do
    params = rope | kvdsl.calibrate(scheme, keys, values, queries, **given)
    cache = made(scheme, shape, 2, build, build_tiers, backend="triton", device=torch.device(device), params=params)
    at = 0
    for chunk in chunks:
        span = slice(at, at + chunk)
        cache.append_and_attend(
            queries[:, :, span], keys[:, :, span], values[:, :, span], counts=(chunk, -(-chunk // 2))
        )
        at += chunk
    if isinstance(cache, QuantizedCache):
        cache.crop([cache.lengths[0] - 3, cache.lengths[1]])
        cache.reorder([1, 0])
    if isinstance(cache, QuantizedCache) and not rope:
        static = StaticCache(cache, tokens)
        static.begin()
        for at in range(steps):
            span = slice(at, at + 1)
            static.step(queries[:, :, span], keys[:, :, span], values[:, :, span])
        static.settle()
    for side in SIDES:
        cache.dense(side).cpu()


def numbers(heads: int, tokens: int, channels: int, seed: int) -> torch.Tensor:
    """Normal float16 numbers of two sequences."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, heads, tokens, channels, generator=generator).half()


if __name__ == "__main__":
    walked(sys.argv[1])
