"""Laws of a layer's cache: chunks, batches, windows, attention, failures, cropping, copies."""

from __future__ import annotations

import copy
import itertools
import pickle
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cache_cases import (
    DIM,
    HEADS,
    SCHEMES,
    Failing,
    Largest,
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

from kvdsl.errors import CacheError, ShapeError
from kvdsl.quantized_cache import QuantizedCache
from kvdsl.scheme import SIDES, Recent
from kvdsl.schemes import int8_tensor

EACH = pytest.mark.parametrize("name", SCHEMES)


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


@pytest.mark.parametrize("name", ["whole", "bare"])
def test_growing_moves_and_copies_nothing(name: str) -> None:
    """The pool stays where it is, and no append makes a tensor larger than its chunk, the exact rows and the page
    table: the packed cache is never concatenated.  Address space is not memory: pages are backed as they are used."""
    kernels = compiled(name)
    cache = QuantizedCache(kernels, 2, capacity=100_000)
    place, used = cache.pool.bytes.data_ptr(), []
    keys, values = pair(2, 64)
    exact = cache._now.key_rows.nbytes + keys.numel() * 4
    for _ in range(20):
        with Largest() as largest:
            cache.append(keys, values)
        assert largest.nbytes <= 2 * exact + 4096
        used.append(cache.pool.committed)
    assert cache.pool.bytes.data_ptr() == place
    assert max(b - a for a, b in itertools.pairwise(used)) <= 2 * 2 * kernels.page_bytes
    assert cache.pool.bytes.nbytes > 50 * used[-1]


def test_a_full_cache_says_so() -> None:
    """Past its capacity a cache refuses with the bytes needed and stays usable."""
    keys, values = pair(1, 300)
    cache = filled(compiled("bare"), keys[:, :, :200], values[:, :, :200], capacity=200)
    before = view(cache)
    with pytest.raises(CacheError, match=r"pages \(\d+ bytes\) are needed, 0 of 4 are free"):
        cache.append(keys[:, :, 200:], values[:, :, 200:])
    assert same(view(cache), before)
    cache.append(keys[:, :, 200:250], values[:, :, 200:250])
    assert cache.lengths == (250,)


@EACH
def test_nothing_at_all(name: str) -> None:
    """No sequences, no tokens, no queries, and one token work."""
    kernels = compiled(name)
    none = QuantizedCache(kernels, 0)
    none.append(*pair(0, 30))
    out, lse = none.append_and_attend(numbers(0, 1, heads=4), *pair(0, 1))
    assert (
        out.shape == (0, 4, 1, DIM) and lse.shape == (0, 4, 1) and none.dense("keys").numel() == 0 and none.bits() == 0
    )
    none.crop(0)
    none.reset()
    none.record(4)
    cache = QuantizedCache(kernels, 2)
    out, _ = cache.append_and_attend(numbers(2, 0, heads=4), *pair(2, 0))
    assert out.shape == (2, 4, 0, DIM) and cache.lengths == (0, 0)
    cache.append(*pair(2, 90), counts=(0, 0))
    assert cache.dense("keys").shape == (2, HEADS, 0, DIM)
    keys, values = pair(2, 1)
    out, _ = cache.append_and_attend(numbers(2, 1, heads=4), keys, values)
    torch.testing.assert_close(
        out, cache.dense("values").repeat_interleave(2, 1) if name == "stored" else values.repeat_interleave(2, 1)
    )


def test_wrong_tensors_are_refused_first() -> None:
    """Every refusal names the tensor, its value and what would be right, and leaves the cache untouched."""
    keys, values = pair(2, 40)
    cache = filled(compiled("whole"), keys, values)
    before = view(cache)
    query = numbers(2, 1, heads=4)
    calls: list[tuple[str, Callable[[], object]]] = [
        (r"keys: shape \(2, 2, 40, 16\).*\(2, 2, any, 32\)", lambda: cache.append(keys[..., :16], values)),
        (r"values: shape \(1, 2, 40, 32\)", lambda: cache.append(keys, values[:1])),
        (r"keys: shape \(2, 40, 32\)", lambda: cache.append(keys[:, 0], values)),
        (r"keys: torch.float16 .* torch.float32", lambda: cache.append(keys.half(), values)),
        (r"values: torch.float64", lambda: cache.append(keys, values.double())),
        (r"values: 39 tokens beside 40", lambda: cache.append(keys, values[:, :, 1:])),
        (r"keys: it requires a gradient", lambda: cache.append(keys.clone().requires_grad_(), values)),
        (r"keys: it is on meta, the cache on cpu", lambda: cache.append(keys.to("meta"), values)),
        (r"keys: list is no tensor", lambda: cache.append([], values)),  # type: ignore[arg-type]
        (r"counts: 1 numbers for 2", lambda: cache.append(keys, values, counts=(3,))),
        (r"counts\[1\]: 41 .* 0 to 40", lambda: cache.append(keys, values, counts=(3, 41))),
        (r"counts\[0\]: True", lambda: cache.append(keys, values, counts=(True, 1))),
        (r"query: shape \(2, 2, 1, 32\)", lambda: cache.append_and_attend(query[:, :2], keys, values)),
        (r"length: -1", lambda: cache.crop(-1)),
        (r"length: 1 numbers for 2", lambda: cache.crop([3])),
        (r"index\[1\]: 2 ", lambda: cache.reorder([0, 2])),
        (r"times: 1.0", lambda: cache.repeat(1.0)),  # type: ignore[arg-type]
        (r"draft: -2", lambda: cache.record(-2)),
        (r"starts\[0\]: 41", lambda: cache.hide([41, 0])),
        (r"window: 0", lambda: QuantizedCache(cache.kernels, 1, window=0)),
        (r"batch: -1", lambda: QuantizedCache(cache.kernels, -1)),
    ]
    assert len({sentence for sentence, _ in calls}) == len(calls)
    for sentence, call in calls:
        with pytest.raises(ShapeError, match=sentence):
            call()
        assert same(view(cache), before), sentence


def test_any_strides_are_taken() -> None:
    """Transposed, sliced and expanded tensors are stored like contiguous ones."""
    kernels = compiled("whole")
    keys, values = pair(2, 90)
    plain = view(filled(kernels, keys.contiguous(), values.contiguous()))
    odd = torch.stack([keys, values], -1)
    assert same(plain, view(filled(kernels, odd[..., 0], odd[..., 1], [40, 41, 50])))
    one = numbers(1, 1)[:, :1].expand(2, HEADS, 90, DIM)
    assert same(view(filled(kernels, one, one)), view(filled(kernels, one.contiguous(), one.contiguous(), [7])))


def test_global_state_does_not_matter() -> None:
    """Default dtype, default device, inference mode and autograd change nothing."""
    kernels = compiled("whole")
    keys, values = pair(2, 90)
    plain = view(filled(kernels, keys, values, [40, 41]))
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            cache = filled(kernels, keys, values, [40, 41], device="cpu")
    finally:
        torch.set_default_dtype(torch.float32)
    assert same(view(cache), plain)
    with torch.inference_mode():
        inside = filled(kernels, keys[:, :, :41], values[:, :, :41], [40])
    inside.append(keys[:, :, 41:], values[:, :, 41:])
    assert same(view(inside), plain)


def test_a_state_is_frozen() -> None:
    """What a step's attention sees does not change while the step lasts, whatever is asked of the cache."""
    keys, values = pair(1, 80)
    query = numbers(1, 12, heads=4)
    cache = filled(compiled("whole"), keys[:, :, :60], values[:, :, :60])
    state = cache.append(keys[:, :, 60:72], values[:, :, 60:72])
    first, _ = cache.attend(query, state)
    view(cache)
    cache.state()
    cache.fork()
    assert torch.equal(cache.attend(query, state)[0], first)


def test_one_thread_writes() -> None:
    """A second thread that changes the cache while one is at it is told so; the first finishes."""
    keys, values = pair(1, 40)
    cache = QuantizedCache(compiled("bare"), 1, capacity=128)
    inside, go, errors = threading.Event(), threading.Event(), []

    def slow() -> None:
        with cache._changing():
            inside.set()
            go.wait(10)

    thread = threading.Thread(target=slow)
    thread.start()
    inside.wait(10)
    try:
        cache.append(keys, values)
    except CacheError as error:
        errors.append(str(error))
    go.set()
    thread.join()
    assert errors and "thread" in errors[0] and cache.lengths == (0,)
    cache.append(keys, values)
    assert cache.lengths == (40,)


@EACH
def test_copies_are_their_own(name: str) -> None:
    """deepcopy and pickle give caches that equal the original, share nothing with it, and go on alike."""
    kernels = compiled(name)
    keys, values = pair(2, 200)
    cache = filled(kernels, keys[:, :, :150], values[:, :, :150])
    cache.reorder([1, 1])
    before = view(cache)
    for twin in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert same(content(twin, 0), content(cache, 0)) and same(content(twin, 1), content(cache, 1))
        assert twin.pool is not cache.pool and twin.pool.in_use == cache.pool.in_use
        twin.append(keys[:, :, 150:], values[:, :, 150:])
        assert same(view(cache), before)
        fresh = filled(
            kernels, keys[1:].expand(2, -1, -1, -1)[:, :, :150], values[1:].expand(2, -1, -1, -1)[:, :, :150]
        )
        fresh.append(keys[:, :, 150:], values[:, :, 150:])
        assert same(content(twin, 0), content(fresh, 0)) and same(content(twin, 1), content(fresh, 1))


@pytest.mark.parametrize(
    "params, told",
    [
        (None, r"params\['keys.scale'\]: missing; it is calibrated, give params="),
        ({}, r"params\['keys.scale'\]: missing"),
        ({"keys.scale": torch.ones(1, 1)}, r"params\['values.scale'\]: missing"),
        ({"keys.scale": torch.ones(3), "values.scale": torch.ones(1, 1)}, r"shape \(3,\); the right one is \(1, 1\)"),
        ({"keys.scale": torch.full((1, 1), torch.nan), "values.scale": torch.ones(1, 1)}, "no finite floats"),
        ({"keys.scale": 1.0, "values.scale": 1.0}, "float is no tensor"),
    ],
)
def test_calibrated_numbers_are_checked_first(params: Any, told: str) -> None:
    """A cache of a calibrated scheme is not made without its numbers; what the scheme does not want is not kept."""
    kernels = compiled(int8_tensor)
    with pytest.raises(ShapeError, match=told):
        QuantizedCache(kernels, 1, params=params)
    right = {"keys.scale": torch.ones(1, 1), "values.scale": torch.ones(1, 1, dtype=torch.float16)}
    cache = filled(kernels, *pair(1, 9), params=right | {"more": torch.ones(1)})
    assert sorted(cache.params) == sorted(right) and same(view(copy.deepcopy(cache)), view(cache))
