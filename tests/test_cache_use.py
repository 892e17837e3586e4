"""Laws of a layer's cache in use: growth, limits, wrong input, threads, copies."""

from __future__ import annotations

import copy
import itertools
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cache_cases import (
    DIM,
    EACH,
    HEADS,
    Largest,
    compiled,
    content,
    filled,
    numbers,
    pair,
    same,
    view,
)

from kvdsl.errors import CacheError, ShapeError
from kvdsl.quantized_cache import QuantizedCache
from kvdsl.schemes import int8_tensor


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
