"""Laws of a layer's cache: chunks, batches, windows, attention, accounting, failures."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest
import torch
from cache_cases import (
    DIM,
    EACH,
    HEADS,
    SCHEMES,
    Failing,
    attention,
    compiled,
    content,
    filled,
    numbers,
    pair,
    same,
    told,
    view,
)

from kvdsl.quantized_cache import QuantizedCache
from kvdsl.scheme import SIDES, Recent


@EACH
def test_bytes_do_not_depend_on_chunks(name: str) -> None:
    """Appending one by one, in any chunks or at once stores the same bytes and numbers."""
    kernels = compiled(name)
    keys, values = pair(2, 150)
    whole = view(filled(kernels, keys, values))
    assert same(whole, view(filled(kernels, keys, values, range(1, 150))))
    for seed in range(6):
        cuts = random.Random(seed).sample(range(150), 1 + 2 * seed)
        assert same(whole, view(filled(kernels, keys, values, cuts)))


@EACH
def test_neighbours_do_not_matter(name: str) -> None:
    """A sequence in a ragged batch is stored and attended as it is alone; left padding never gets in."""
    kernels = compiled(name)
    keys, values = pair(3, 150)
    query = numbers(3, 4, heads=4, seed=7)
    steps = [(60, (60, 0, 7)), (1, (1, 1, 1)), (5, (5, 0, 5)), (40, (1, 40, 33)), (1, (1, 1, 1)), (4, (4, 4, 4))]
    batch = QuantizedCache(kernels, 3, capacity=512)
    alone = [QuantizedCache(kernels, 1, capacity=512) for _ in range(3)]
    at = [0, 0, 0]
    for chunk, counts in steps:
        fresh = [torch.full((3, HEADS, chunk, DIM), float("nan")) for _ in SIDES]
        for b, count in enumerate(counts):
            for store, source in zip(fresh, (keys, values), strict=True):
                store[b, :, chunk - count :] = source[b, :, at[b] : at[b] + count]
        out, lse = batch.append_and_attend(query[:, :, :1], *fresh, counts=counts)
        for b, count in enumerate(counts):
            one = [source[b : b + 1, :, at[b] : at[b] + count] for source in (keys, values)]
            single, single_lse = alone[b].append_and_attend(query[b : b + 1, :, :1], one[0], one[1])
            at[b] += count
            assert same(content(batch, b), content(alone[b], 0))
            if at[b]:
                torch.testing.assert_close(out[b : b + 1], single, rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(lse[b : b + 1], single_lse, rtol=1e-5, atol=1e-5)
    assert batch.lengths == tuple(at)


@EACH
def test_window_and_sinks_stay_exact(name: str) -> None:
    """After every append the sinks and the tokens that the window keeps are the input; the rest is packed, as many as
    the scheme says."""
    kernels = compiled(name)
    scheme = SCHEMES[name]
    sinks = scheme.sinks.tokens if scheme.sinks else 0
    recent = scheme.recent.tokens if scheme.recent else 0
    keys, values = pair(1, 110)
    cache = QuantizedCache(kernels, 1, capacity=512)
    for n in range(1, 111):
        cache.append(keys[:, :, n - 1 : n], values[:, :, n - 1 : n])
        for side, given in zip(SIDES, (keys, values), strict=True):
            done = cache.packed(side)[0]
            whole = name in ("whole", "stored") and side == "keys"
            routed = max(0, n - sinks)
            assert done == (routed // recent * recent if whole else max(0, routed - recent))
            if n % 9 == 0:
                dense = cache.dense(side)
                assert dense.shape[2] == n
                assert torch.equal(dense[:, :, :sinks], given[:, :, : min(n, sinks)])
                assert torch.equal(dense[:, :, sinks + done :], given[:, :, sinks + done : n])
                if done:
                    assert not torch.equal(dense[:, :, sinks : sinks + done], given[:, :, sinks : sinks + done])


@EACH
@pytest.mark.parametrize("window", [None, 40])
def test_attention_of_a_step(name: str, window: int | None) -> None:
    """A step sees its fresh tokens exactly and older ones as they were stored before it; all as stored after it where
    the scheme says so.  This holds for chunks of every size, so verifying a draft equals generating it."""
    kernels = compiled(name)
    keys, values = pair(2, 210)
    query = numbers(2, 210, heads=4, seed=5)
    cache, full = QuantizedCache(kernels, 2, capacity=512, window=window), QuantizedCache(kernels, 2, capacity=512)
    edges = [0, *itertools.accumulate([1, 2, 30, 1, 16, 17, 1, 70, 3, 1, 1, 50, 16, 1])]
    for begin, end in zip(edges, edges[1:], strict=False):
        fresh = [x[:, :, begin:end] for x in (keys, values)]
        before = [full.dense(side) for side in SIDES]
        asked = query[:, :, begin:end]
        out, _ = cache.append_and_attend(asked, *fresh)
        full.append(*fresh)
        if SCHEMES[name].prefill == "exact":
            seen = [torch.cat(both, 2) for both in zip(before, fresh, strict=True)]
        else:
            seen = [full.dense(side) for side in SIDES]
        torch.testing.assert_close(out.double(), attention(asked, seen[0], seen[1], window), rtol=2e-5, atol=2e-5)


def test_chunks_attend_like_single_steps() -> None:
    """Between two flushes a chunk of queries gets what one query after the other gets."""
    kernels = compiled(SCHEMES["rolling"].with_(recent=Recent(32, "whole")))
    keys, values = pair(1, 60)
    query = numbers(1, 60, heads=4, seed=3)
    for begin, end in ((34, 44), (34, 66), (40, 60)):
        one, chunk = (filled(kernels, keys[:, :, :begin], values[:, :, :begin]) for _ in range(2))
        span = slice(begin, end)
        together, _ = chunk.append_and_attend(query[:, :, span], keys[:, :, span], values[:, :, span])
        steps = [
            one.append_and_attend(query[:, :, i : i + 1], keys[:, :, i : i + 1], values[:, :, i : i + 1])[0]
            for i in range(begin, min(end, 60))
        ]
        torch.testing.assert_close(together, torch.cat(steps, 2), rtol=1e-5, atol=1e-5)
        assert same(view(one), view(chunk))


@EACH
def test_accounting_is_what_is_held(name: str) -> None:
    """nbytes is the sum over the tensors the cache holds and its pages; bits are bytes for each number, times eight."""
    keys, values = pair(2, 150)
    cache = filled(compiled(name), keys, values)
    now = cache._now
    tensors = [x for x in vars(now).values() if isinstance(x, torch.Tensor)] + [now.table.tensor]
    pages = {page for ids in now.table.ids for page in ids}
    assert (
        cache.nbytes == sum(t.numel() * t.element_size() for t in tensors) + (1 + len(pages)) * cache.kernels.page_bytes
    )
    assert cache.bits() == 8 * cache.nbytes / (2 * 2 * HEADS * 150 * DIM)
    tokens = max(cache.packed("keys") + cache.packed("values"))
    assert len(pages) == 2 * -(-tokens // cache.kernels.page_tokens)
    assert cache.stats()["bytes"] == cache.nbytes and cache.stats()["tokens"] == 300


Change = Callable[[QuantizedCache], object]
MORE = [x[:, :, 150:] for x in pair(2, 300)]
CHANGES: dict[str, Change] = {
    "one": lambda c: c.append(MORE[0][:, :, :1], MORE[1][:, :, :1]),
    "small": lambda c: c.append(MORE[0][:, :, :14], MORE[1][:, :, :14]),
    "large": lambda c: c.append(MORE[0], MORE[1]),
    "ragged": lambda c: c.append(MORE[0][:, :, :70], MORE[1][:, :, :70], counts=(3, 70)),
    "attend": lambda c: c.append_and_attend(numbers(2, 9, heads=4), MORE[0][:, :, :9], MORE[1][:, :, :9]),
    "crop": lambda c: c.crop(90),
    "record": lambda c: c.record(20),
    "reorder": lambda c: c.reorder([1, 1]),
    "repeat": lambda c: c.repeat(2),
    "fork": lambda c: c.fork([0]),
    "hide": lambda c: c.hide([3, 0]),
    "reset": lambda c: c.reset(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["whole", "rolling"])
def test_a_failed_change_changes_nothing(name: str, change: str, error: type[BaseException]) -> None:
    """Whichever of its tensor operations fails, the cache is as it was, and can do afterwards what it could before."""
    keys, values = pair(2, 150)
    cache = filled(compiled(name), keys, values, [77, 149])
    twin = cache.fork()
    before, other = told(cache), told(twin)
    for at in itertools.count(1):
        try:
            with Failing(at, error):
                CHANGES[change](cache)
            break
        except error:
            assert same(told(cache), before), f"operation {at} of {change}"
    assert at > 1
    assert same(content(twin, 0)["keys"], other["keys"][0]) and same(twin.dense("values"), other["values"])
    fresh = filled(compiled(name), keys, values)
    CHANGES[change](fresh)
    for b in range(cache.batch):
        assert same(content(cache, b), content(fresh, b))
