"""Tokens with keys and values of their own, and what a cache that holds one sequence alone says of them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from cache_cases import DIM, HEADS, SHAPE, compiled, numbers
from torch import Tensor

from kvdsl.paged_cache import PagedCache
from kvdsl.quantized_cache import QuantizedCache

IDS, LONGEST = 3, 400
TABLE = torch.randn(2, IDS, LONGEST, HEADS, DIM, generator=torch.Generator().manual_seed(5))
"""A token's key and value follow from its id and its place, so that equal prefixes have equal ones."""
QUERY = numbers(1, 2, heads=SHAPE.q_heads or HEADS, seed=9)


def given(tokens: list[int], begin: int = 0) -> tuple[Tensor, Tensor]:
    """Keys and values (1, H, n, D) of the tokens from place `begin` on."""
    places = torch.arange(begin, len(tokens))
    rows = TABLE[:, torch.tensor(tokens[begin:], dtype=torch.int64), places]
    return tuple(rows.permute(0, 2, 1, 3)[:, None].contiguous())


def stepped(rows: list[tuple[list[int], int]]) -> tuple[Tensor, Tensor, list[int]]:
    """Keys and values of a step in which each sequence of tokens gets those from `begin` on, and how many these are."""
    counts = [len(tokens) - begin for tokens, begin in rows]
    chunk = max(counts, default=0)
    both = torch.zeros(2, len(rows), HEADS, chunk, DIM)
    for b, (tokens, begin) in enumerate(rows):
        for side, numbers_ in enumerate(given(tokens, begin)):
            both[side, b, :, chunk - counts[b] :] = numbers_[0]
    return both[0], both[1], counts


def made(name: str, pages: int = 12, **options: Any) -> PagedCache:
    return PagedCache(compiled(name), pages, **{"capacity": LONGEST, "batch_invariant": True, **options})


@lru_cache(maxsize=2048)
def alone(name: str, tokens: tuple[int, ...]) -> tuple[Tensor, list[Tensor]]:
    """The attention of QUERY over a cache that was given these tokens alone, and the bytes of its full pages."""
    kernels = compiled(name)
    cache = QuantizedCache(kernels, 1, capacity=LONGEST, batch_invariant=True)
    cache.append(*given(list(tokens)))
    full = min(cache.packed("keys")[0], cache.packed("values")[0]) // kernels.page_tokens
    table, pool = cache.pages()
    return cache.attend(QUERY, cache.state())[0], [pool[page].clone() for page in table[0, :full].tolist()]


def attended(cache: PagedCache, names: list[Any]) -> Tensor:
    """The attention of QUERY over sequences of a paged cache."""
    return cache.attend(names, QUERY.expand(len(names), -1, -1, -1).contiguous())[0]


def told(cache: PagedCache) -> dict[str, Any]:
    """All that a refused call may not change."""
    pages = {name: cache.pages(name) for name in cache.names}
    used = sorted({page for ids in pages.values() for page in ids})
    return {
        "names": cache.names,
        "swapped": cache.swapped,
        "lengths": [cache.length(name) for name in cache.names],
        "pages": pages,
        "bytes": cache.pool.bytes[used].clone(),
        "cached": cache.pool.cached,
        "holders": [cache.pool.holders(page) for page in used],
        "stats": {key: value for key, value in cache.stats().items() if key not in ("rows", "committed")},
    }
