"""Laws of a layer's cache: cropping, reordering, sharing, letting go, and what stays hidden."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from cache_cases import (
    EACH,
    HEADS,
    SCHEMES,
    attention,
    compiled,
    content,
    filled,
    numbers,
    pair,
    same,
    view,
)

from kvdsl.errors import CacheError
from kvdsl.quantized_cache import QuantizedCache
from kvdsl.scheme import SIDES


@EACH
def test_cropping_a_draft_loses_nothing(name: str) -> None:
    """While a draft is recorded, cropping back within it gives the cache that never saw the rest, and goes on like
    it."""
    kernels = compiled(name)
    keys, values = pair(2, 140)
    junk = numbers(2, 24, seed=99)
    for kept, chunk in itertools.product((0, 1, 5, 31, 35, 63, 66, 67, 100), (1, 3, 24)):
        cache = filled(kernels, keys[:, :, :kept], values[:, :, :kept])
        cache.record(24)
        for begin in range(0, 24, chunk):
            cache.append(junk[:, :, begin : begin + chunk], junk[:, :, begin : begin + chunk])
        cache.crop(kept, requantize=False)
        fresh = filled(kernels, keys[:, :, :kept], values[:, :, :kept])
        for b in range(2):
            assert same(content(cache, b), content(fresh, b)), (kept, chunk)
        for c in (cache, fresh):
            c.append(keys[:, :, kept:], values[:, :, kept:])
        for b in range(2):
            assert same(content(cache, b), content(fresh, b)), (kept, chunk)
        assert cache.requantized == 0


@EACH
def test_cropping_further_back(name: str) -> None:
    """Kept tokens keep their numbers when a crop goes behind the exact rows; only blocks that the cut divides are
    decoded, counted, and refused on demand."""
    kernels = compiled(name)
    keys, values = pair(2, 150)
    whole = filled(kernels, keys, values)
    dense = {side: whole.dense(side) for side in SIDES}
    block = 32 if name == "stored" else 16 if name == "whole" else 1
    sinks = 3 if name == "whole" else 2 if name == "rolling" else 0
    for length in range(0, 150, 7):
        cache = filled(kernels, keys, values)
        before = view(cache)
        divided = max(0, length - sinks) % block if length < cache.packed("keys")[0] + sinks else 0
        if divided and length < 120:
            with pytest.raises(CacheError, match="quantized twice"):
                cache.crop(length, requantize=False)
            assert same(view(cache), before)
        cache.crop(length)
        assert cache.lengths == (length, length)
        assert bool(divided and length < 120) <= bool(cache.requantized) and cache.requantized <= 2 * divided
        for side, given in zip(SIDES, (keys, values), strict=True):
            now, old = cache.dense(side), dense[side][:, :, :length]
            assert torch.equal(torch.where(now == given[:, :, :length], old, now), old)
        cache.append(keys[:, :, length:], values[:, :, length:])
        assert cache.packed("values") == whole.packed("values") and cache.lengths == (150, 150)
        for side in SIDES:
            assert (cache.dense(side) - dense[side]).abs().max() < 1.5
        assert cache.pool.in_use == whole.pool.in_use


def test_cropping_to_more_than_there_is_does_nothing() -> None:
    """crop says at most; a ragged batch is cut only where it is longer."""
    keys, values = pair(2, 60)
    cache = QuantizedCache(compiled("rolling"), 2, capacity=128)
    cache.append(keys, values, counts=(60, 20))
    before = content(cache, 1)
    cache.crop(99)
    cache.crop(30)
    assert cache.lengths == (30, 20) and same(content(cache, 1), before)
    cache.crop([28, 9])
    assert cache.lengths == (28, 9) and torch.equal(content(cache, 1)["keys"][:, :2], keys[1, :, 40:42])


@EACH
def test_reordering_shares_pages(name: str) -> None:
    """Reorder, select, repeat and fork give sequences that live on their own: each equals one that was never shared."""
    kernels = compiled(name)
    keys, values = pair(3, 100)
    cache = filled(kernels, keys, values)
    pages = cache.pool.in_use
    cache.reorder([2, 0, 0])
    cache.repeat(2)
    cache.select(torch.tensor([5, 0, 3]))
    fork = cache.fork([2])
    assert cache.pool.in_use == (pages // 3) * 2
    more = [numbers(3, 120, seed=s) for s in (50, 51)]
    other = [numbers(1, 120, seed=s) for s in (60, 61)]
    for begin, end in ((0, 1), (1, 40), (40, 120)):
        cache.append(*(x[:, :, begin:end] for x in more))
        fork.append(*(x[:, :, begin:end] for x in other))
    for b, origin in enumerate((0, 2, 0)):
        given = [torch.cat([x[origin, None], y[b, None]], 2) for x, y in zip((keys, values), more, strict=True)]
        assert same(content(cache, b), content(filled(kernels, given[0], given[1]), 0))
    given = [torch.cat([x[0, None], y], 2) for x, y in zip((keys, values), other, strict=True)]
    assert same(content(fork, 0), content(filled(kernels, given[0], given[1]), 0))
    assert cache.pool.copies > 0


def test_pages_come_back() -> None:
    """reset, a select of nothing and a dropped fork leave no page in use, and recounting finds the same."""
    keys, values = pair(2, 150)
    cache = filled(compiled("bare"), keys, values)
    fork = cache.fork()
    fork.append(keys, values)
    assert cache.pool.in_use == 6 + 6
    del fork
    cache.pool.recount()
    assert cache.pool.in_use == 6
    cache.reset()
    assert cache.pool.in_use == 0 and cache.lengths == (0, 0)
    cache.append(keys, values)
    cache.select([])
    assert cache.batch == 0 and cache.pool.in_use == 0


@EACH
def test_sliding_window_frees_pages(name: str) -> None:
    """With a sliding window the length goes on counting, while the pages held stay bounded; a crop that would need what
    was let go is refused, one that would not is done."""
    kernels = compiled(name)
    keys, values = pair(1, 700)
    query = numbers(1, 1, heads=4)
    for cuts in (range(1, 700), (), (3, 90, 400)):
        cache = filled(kernels, keys, values, cuts, window=70)
        out, _ = cache.append_and_attend(query, query[:, :HEADS], query[:, :HEADS])
        assert cache.lengths == (701,)
        assert len(set(cache.held())) <= 4
        full = filled(kernels, keys, values)
        seen = [torch.cat([full.dense(side), query[:, :HEADS]], 2) for side in SIDES]
        if SCHEMES[name].prefill == "stored":
            full.append(query[:, :HEADS], query[:, :HEADS])
            seen = [full.dense(side) for side in SIDES]
        torch.testing.assert_close(out.double(), attention(query, seen[0], seen[1], 70), rtol=2e-5, atol=2e-5)
        before = view(cache)
        with pytest.raises(CacheError, match="sliding window"):
            cache.crop(400)
        assert same(view(cache), before)
        cache.crop(699)
        assert cache.lengths == (699,)


def test_hidden_tokens() -> None:
    """Tokens before a sequence's start are stored and not seen."""
    keys, values = pair(2, 50)
    query = numbers(2, 1, heads=4)
    cache = filled(compiled("bare"), keys, values)
    cache.hide([20, 0])
    dense = [cache.dense(side) for side in SIDES]
    out, _ = cache.attend(query, cache.state())
    torch.testing.assert_close(
        out[:1].double(), attention(query[:1], dense[0][:1, :, 20:], dense[1][:1, :, 20:]), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(out[1:].double(), attention(query[1:], dense[0][1:], dense[1][1:]), rtol=1e-5, atol=1e-5)


def test_packing_looks_at_what_is_due_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences of any lengths that pack in one step cost what those of one length do: each a few blocks of its own."""
    cache = QuantizedCache(compiled("bare"), 2, capacity=2000)
    keys, values = pair(2, 1500)
    cache.append(keys, values, counts=(1500, 3))
    kind, seen = type(cache.kernels.module), list[tuple[int, int]]()
    plain = kind.pack

    def pack(
        self: Any, side: Any, rows: Any, first: Any, offset: Any, begin: Any, end: Any, reach: Any, *rest: Any
    ) -> None:
        seen.append(reach)
        plain(self, side, rows, first, offset, begin, end, reach, *rest)

    monkeypatch.setattr(kind, "pack", pack)
    cache.append(keys[:, :, :1], values[:, :, :1])
    assert len(seen) == 2 and all(high - low <= 2 * cache.kernels.page_tokens for low, high in seen)
