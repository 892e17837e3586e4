"""Decoding in place: what a StaticCache takes over, gives back and refuses.  That its steps are appends is a law."""

from __future__ import annotations

import pytest
from cache_cases import DIM, HEADS, SCHEMES, compiled, numbers, pair

from kvdsl.codegen import build
from kvdsl.errors import BackendError, CacheError, ShapeError
from kvdsl.params import ROPE
from kvdsl.quantized_cache import QuantizedCache
from kvdsl.rope import usual
from kvdsl.scheme import PreRope, Scheme, Store, Uniform, per_token
from kvdsl.shape import Shape
from kvdsl.static_cache import StaticCache
from kvdsl.testing.caches import require_same

KEYS, VALUES = pair(2, 120)


def filled(name: str, tokens: int) -> QuantizedCache:
    """A cache of two sequences, one 5 tokens shorter."""
    cache = QuantizedCache(compiled(name), 2, capacity=200)
    cache.append(KEYS[:, :, :tokens], VALUES[:, :, :tokens], counts=(tokens, tokens - 5))
    return cache


def stepped(static: StaticCache, begin: int, end: int) -> None:
    """The tokens from `begin` on, one by one."""
    for at in range(begin, end):
        static.step(numbers(2, 1, heads=4, seed=at), KEYS[:, :, at : at + 1], VALUES[:, :, at : at + 1])


@pytest.mark.parametrize("name", SCHEMES)
def test_it_goes_on_behind_what_the_cache_did_meanwhile(name: str) -> None:
    """In place, in chunks, in place again with the same tensors: the same as chunks alone."""
    told, cache = filled(name, 40), filled(name, 40)
    static = StaticCache(cache, 120)
    for begin, end in ((40, 75), (95, 120)):
        static.begin()
        stepped(static, begin, end)
        static.settle()
        told.append(KEYS[:, :, begin:end], VALUES[:, :, begin:end])
        require_same(f"behind {end} tokens", cache, told)
        for each in (cache, told) if end < 95 else ():
            each.append(KEYS[:, :, end:95], VALUES[:, :, end:95])


def test_layers_may_share_counts() -> None:
    """The layer that made them moves them on for both; one with other tokens is refused."""
    first, second = (filled("whole", 40) for _ in range(2))
    leader = StaticCache(first, 60)
    follower = StaticCache(second, 60, leader.counts)
    leader.begin()
    follower.begin()
    for at in range(40, 50):
        stepped(leader, at, at + 1)
        stepped(follower, at, at + 1)
    for static in (leader, follower):
        static.settle()
    require_same("follower", second, first)
    second.crop(44)
    leader.begin()
    with pytest.raises(CacheError, match="other tokens"):
        follower.begin()


def test_tokens_behind_the_capacity_are_told() -> None:
    """What fits is there, the rest is an error, and nothing was written elsewhere."""
    cache = filled("bare", 40)
    static = StaticCache(cache, 42)
    static.begin()
    stepped(static, 40, 42)
    with pytest.raises(CacheError, match="capacity: 42 tokens; 3 more"):
        stepped(static, 42, 45)
        static.settle()
    assert cache.lengths == (42, 40)


def test_what_is_refused() -> None:
    """A pool without the pages, a cache changed meanwhile, two tokens at once, packing by positions."""
    cache = filled("whole", 40)
    with pytest.raises(CacheError, match="pages"):
        StaticCache(cache, 2000).begin()
    assert cache.lengths == (40, 35)
    static = StaticCache(cache, 60)
    static.begin()
    with pytest.raises(ShapeError, match="takes one"):
        static.step(numbers(2, 1, heads=4), KEYS[:, :, :2], VALUES[:, :, :2])
    cache.append(KEYS[:, :, 40:41], VALUES[:, :, 40:41])
    with pytest.raises(CacheError, match=r"begin\(\) again"):
        static.settle()
    store = Store(Uniform(4), scale=per_token())
    turned = build(Scheme(keys=store.with_(transform=PreRope()), values=store), Shape(DIM, HEADS), "torch")
    with pytest.raises(BackendError, match="PreRope"):
        StaticCache(QuantizedCache(turned, 1, params={ROPE: usual(DIM)}), 20)


def test_room_of_another_size_is_refused() -> None:
    """Counts that stop at another capacity would let a layer write behind its own; a longer ring does not fit rows."""
    cache = filled("whole", 40)
    leader = StaticCache(filled("whole", 40), 80)
    with pytest.raises(CacheError, match="counts: of a capacity of 80 tokens, this is 60"):
        StaticCache(cache, 60, leader.counts)
    static = StaticCache(cache, 60)
    cache.record(8)
    with pytest.raises(CacheError, match="more exact rows"):
        static.begin()
    assert cache.lengths == (40, 35)


def test_a_step_changes_tensors_where_they_are() -> None:
    """Counts are on the device and keep their place; the cache itself hears of nothing before `settle`."""
    cache = filled("whole", 40)
    static = StaticCache(cache, 60)
    static.begin()
    before = static.counts.length.data_ptr()
    stepped(static, 40, 44)
    assert static.counts.length.data_ptr() == before and static.counts.length.tolist() == [44, 39]
    assert cache.lengths == (40, 35) and int(static.counts.steps) == 4
