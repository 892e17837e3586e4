"""The paged cache in small: what a chain of hashes tells apart, what a full pool does, what errors leave."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_cases import SHAPE, Failing, compiled, same
from paged_cases import QUERY, alone, attended, given, made, told

from kvdsl.allocator import Allocator, LeastRecent, Resident
from kvdsl.codegen import build, build_tiers
from kvdsl.errors import CacheError, SchemeError, ShapeError
from kvdsl.paged_cache import PagedCache
from kvdsl.paged_rules import unshared
from kvdsl.prefixes import encoded
from kvdsl.quantized_cache import QuantizedCache
from kvdsl.scheme import ALL, Block, Scale, Scheme, Store, Uniform
from kvdsl.schemes import ALL as SHIPPED
from kvdsl.shape import Shape

PROMPT = [place % 3 for place in range(150)]


def entered(cache: PagedCache, name: Hashable, tokens: list[int] = PROMPT, **options: Any) -> int:
    """A sequence with its whole prompt; how much of it was there."""
    found = cache.add(name, tokens, **options)
    cache.append([name], *given(tokens, found))
    return found


# -- what is found ---------------------------------------------------------------------------------------------------


def test_a_page_is_found_by_its_tokens_and_all_before_them() -> None:
    """Another first token, another salt, another scheme or the same tokens one place later: nothing in common."""
    cache = made("bare")
    assert [entered(cache, name) for name in "ab"] == [0, 128] and cache.pages("a")[:2] == cache.pages("b")[:2]
    assert cache.found([*PROMPT[:64], 9, *PROMPT[65:]]) == 64
    assert cache.found([9, *PROMPT[1:]]) == cache.found([9, *PROMPT]) == cache.found(PROMPT, salt="adapter") == 0
    assert cache.found(PROMPT[:64]) == 0, "one token is left to be asked about"
    assert cache.found(PROMPT[:65]) == 64
    roots = {made(name)._index.root for name in ("bare", "rolling", "whole")}  # type: ignore[union-attr]
    assert len(roots) == 3


def test_keys_that_differ_are_encoded_apart() -> None:
    """No key, and no two in a row, look like others."""
    keys: list[int | str | bytes] = [1, 12, -1, "1", b"1", "i1;", "", b"", "1:1"]
    assert len({encoded(key) for key in keys}) == len(keys)
    rows = {encoded(a) + encoded(b) for a in keys for b in keys}
    assert len(rows) == len(keys) ** 2


def test_tokens_told_step_by_step_are_found() -> None:
    """Keys may come with the steps; behind tokens that nobody told no page is found."""
    cache = made("rolling")
    cache.add("told")
    cache.add("half")
    for place in range(0, 150, 50):
        part = PROMPT[: place + 50]
        cache.append(["told"], *given(part, place), tokens=[part[place:]])
        cache.append(["half"], *given(part, place), tokens=None if place == 100 else [part[place:]])
    assert cache.found(PROMPT) == 130
    cache.free("told")
    cache.forget()
    cache.append(["half"], *given([0] * 250, 150), tokens=[[0] * 100])
    assert cache.found(PROMPT) == 0 and entered(cache, "again") == 0


def test_layers_agree_by_the_least() -> None:
    cache = made("bare")
    entered(cache, "a")
    assert [cache.add(most, PROMPT, most=most) for most in (150, 128, 127, 64, 10)] == [128, 128, 64, 64, 0]


def test_freed_pages_are_found_until_they_are_needed() -> None:
    """Those that end a chain go first, and the oldest chain before a younger one."""
    cache, other = made("bare", pages=7), [2] * 150
    entered(cache, "a")
    entered(cache, "b", other)
    cache.free("a")
    cache.free("b")
    stats = cache.stats()
    assert (stats["pages_cached"], stats["pages_free"], stats["pages_used"]) == (4, 3, 0)
    tokens = [1] * 250
    entered(cache, "c", tokens)
    assert cache.stats()["evicted_pages"] == 1 and cache.found(PROMPT) == 64 and cache.found(other) == 128
    assert torch.equal(attended(cache, ["c"]), alone("bare", tuple(tokens))[0])


# -- a full pool -----------------------------------------------------------------------------------------------------


class Youngest:
    """The last used sequence goes first, and the youngest page."""

    asked: tuple[Resident, ...] = ()

    def pages(self, cached: Sequence[int], count: int) -> Sequence[int]:
        return cached[-count:]

    def sequences(self, residents: Sequence[Resident], count: int) -> Sequence[Hashable]:
        self.asked = tuple(residents)
        return [residents[-1].name]


def test_a_hook_says_who_waits() -> None:
    """The sequence that it names is swapped to host memory and comes back bit for bit."""
    chosen = Youngest()
    cache = made("bare", pages=6, eviction=chosen)
    entered(cache, "a")
    entered(cache, "b", [2] * 150)
    entered(cache, "c", [1] * 150)
    assert cache.swapped == ("b",) and [one.name for one in chosen.asked] == ["a", "b"]
    assert [(one.pages, one.own) for one in chosen.asked] == [(3, 3), (3, 3)]
    cache.free("c")
    cache.swap_in("b")
    assert torch.equal(attended(cache, ["b"]), alone("bare", (2,) * 150)[0])


@pytest.mark.parametrize("answer", [["nobody"], ["c"]])
def test_a_hook_that_names_others_is_told(answer: list[str]) -> None:
    """A sequence that is not there, or that is part of the step."""
    cache = made("bare", pages=4)
    entered(cache, "a")
    cache.pool.eviction = type("Wrong", (LeastRecent,), {"sequences": lambda self, residents, count: answer})()
    cache.add("c", [2] * 150)
    before = told(cache)
    with pytest.raises(CacheError, match="none of those it was asked about"):
        cache.append(["c"], *given([2] * 150))
    assert same(before, told(cache))


def test_a_hook_that_gives_wrong_pages_is_told() -> None:
    pool = Allocator(2, 16)
    pool.hold(pool.choose(2))
    for page in (1, 2):
        pool.keep(page)
    pool.release([1, 2])
    for answer in ([], [1, 1], [3], [0]):
        pool.eviction = type("Wrong", (LeastRecent,), {"pages": lambda self, cached, count, a=answer: a})()
        with pytest.raises(CacheError, match=r"eviction: pages\(\) gave"):
            pool.choose(2 if answer == [1, 1] else 1)
        assert pool.cached == (1, 2) and pool.left == 2
    pool.eviction = LeastRecent()
    assert pool.choose(1) == [1]


def test_a_full_pool_says_so_and_changes_nothing() -> None:
    """Sequences are given up only for a step that then has room."""
    for preempt in (False, True):
        cache = made("bare", pages=5, eviction=LeastRecent(preempt))
        entered(cache, "a")
        cache.fork("a", "b")
        cache.add("c", [2] * 350)
        before = told(cache)
        with pytest.raises(CacheError, match=r"6 pages \(\d+ bytes\) are needed, 2 of 5 are free; free or swap out"):
            cache.append(["c"], *given([2] * 350))
        assert same(before, told(cache))
        assert torch.equal(attended(cache, ["b", "a"])[:1], alone("bare", tuple(PROMPT))[0])


# -- refused, with nothing changed -----------------------------------------------------------------------------------

WRONG: list[tuple[str, type[Exception], Callable[[PagedCache, Path], object]]] = [
    ("there is one of this name", CacheError, lambda c, p: c.add("a")),
    ("there is one of this name", CacheError, lambda c, p: c.fork("a", "b")),
    ("there is none of this name", CacheError, lambda c, p: c.free("nobody")),
    ("more than once", CacheError, lambda c, p: c.append(["a", "a"], *(x.expand(2, -1, -1, -1) for x in given([1])))),
    ("it is swapped out", CacheError, lambda c, p: c.append(["a", "away"], *given([1]))),
    ("it is swapped out", CacheError, lambda c, p: c.fork("away", "new")),
    ("it is not swapped out", CacheError, lambda c, p: c.swap_in("a")),
    ("is no token id", ShapeError, lambda c, p: c.add("new", [1, 2.5])),  # type: ignore[list-item]
    ("is no token id", ShapeError, lambda c, p: c.append(["a"], *given([1]), tokens=[[None]])),  # type: ignore[list-item]
    ("give one each", ShapeError, lambda c, p: c.append(["a"], *given([1]), tokens=[[1, 2]])),
    ("was added with", ShapeError, lambda c, p: c.append(["begun"], *given([1]), tokens=[[7]])),
    ("keys: shape", ShapeError, lambda c, p: c.append(["a", "b"], *given([1]))),
    ("query: shape", ShapeError, lambda c, p: c.append_and_attend(["a"], QUERY[..., :8], *given([1]))),
    ("No such file", Exception, lambda c, p: c.swap_out("a", p / "no" / "folder")),
]


@pytest.mark.parametrize("place", range(len(WRONG)))
def test_what_is_refused_changes_nothing(place: int, tmp_path: Path) -> None:
    words, kind, call = WRONG[place]
    cache = made("rolling")
    entered(cache, "a")
    cache.fork("a", "b")
    cache.fork("a", "away")
    cache.swap_out("away")
    cache.add("begun", [5, 6])
    before = told(cache)
    with pytest.raises(kind, match=words):
        call(cache, tmp_path)
    assert same(before, told(cache))


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    """And one of another sequence; with the right one back the sequence is."""
    cache, path = made("rolling"), tmp_path / "s"
    entered(cache, "a")
    entered(cache, "b", PROMPT[:90])
    cache.swap_out("a", path)
    right = path.read_bytes()
    cache.swap_out("b", path)
    wrong = path.read_bytes()
    for data, words in ((right[:-1] + bytes([right[-1] ^ 1]), "damaged"), (wrong, "another sequence")):
        path.write_bytes(data)
        before = told(cache)
        with pytest.raises(CacheError, match=words):
            cache.swap_in("a")
        assert same(before, told(cache))
    path.write_bytes(right)
    assert QuantizedCache.load(path, compiled("rolling")).lengths == (150,)
    cache.swap_in("a")
    assert torch.equal(attended(cache, ["a"]), alone("rolling", tuple(PROMPT))[0])


def test_a_step_that_fails_anywhere_is_undone() -> None:
    """An error in any tensor operation of a step, among them those that take cached pages: every sequence is as it was,
    and what is still found is right."""
    cache = made("rolling", pages=6)
    entered(cache, "a", [2] * 150)
    cache.free("a")
    entered(cache, "b", PROMPT[:140])
    cache.fork("b", "c")
    cache.add("d", [1] * 150)
    keys, values = (torch.cat([given(PROMPT, 140)[i].expand(2, -1, -1, -1), given([1] * 10)[i]]) for i in range(2))
    right = alone("rolling", tuple(PROMPT[:140]))[0]
    failures = 0
    for at in count(1):
        before = {name: (cache.length(name), cache.pages(name)) for name in cache.names}
        try:
            with Failing(at, RuntimeError):
                cache.append(["c", "b", "d"], keys, values)
            break
        except RuntimeError:
            failures += 1
        assert before == {name: (cache.length(name), cache.pages(name)) for name in cache.names}
        assert torch.equal(attended(cache, ["b"]), right)
        stats = cache.stats()
        assert stats["pages_free"] + stats["pages_used"] + stats["pages_cached"] == 6
    assert failures > 10
    assert torch.equal(attended(cache, ["b", "c"])[1:], alone("rolling", tuple(PROMPT))[0])


# -- what cannot be shared -------------------------------------------------------------------------------------------


def test_schemes_whose_pages_mean_nothing_elsewhere_are_refused() -> None:
    with pytest.raises(SchemeError, match="tiers: 2 under .*Saliency"):
        PagedCache(build_tiers(SHIPPED["zipcache"], SHAPE, "torch"), 4)  # type: ignore[arg-type]
    whole = Store(Uniform(4), scale=Scale(Block(tokens=ALL, channels=1)))
    anew = Scheme(keys=whole, values=Store(Uniform(4), scale=Scale(Block(1))), requantize="on_flush")
    assert [fault.place for fault in unshared(anew)] == ["requantize", "keys.scale.block.tokens"]
    assert [fault.place for fault in unshared(Scheme(both=whole.with_(scale=Scale(Block(1))), heads={0: anew}))] == [
        "heads"
    ]
    assert [name for name, scheme in SHIPPED.items() if bool(unshared(scheme)) != scheme.routed] == []
    with pytest.raises(ShapeError, match=r"shape\.placed"):
        PagedCache(build(SHIPPED["token4"], Shape(32, 2, 4, "fp32", placed=True), "torch"), 4)


def test_behind_a_sliding_window_nothing_is_found() -> None:
    """But sequences come and go there, too, and let go of pages."""
    with pytest.raises(CacheError, match="prefixes: True, but a sliding window of 70"):
        made("bare", window=70, prefixes=True)
    cache = made("bare", window=70)
    assert [entered(cache, name, [1] * 250) for name in "ab"] == [0, 0]
    cache.fork("a", "c")
    cache.append(["c", "b"], *(x.expand(2, -1, -1, -1) for x in given([1] * 255, 250)))
    assert cache.pages("c")[0] == 0 and cache.stats()["pages_cached"] == 0
    cache.swap_out("c")
    cache.swap_in("c")
    solo = QuantizedCache(compiled("bare"), 1, capacity=400, batch_invariant=True, window=70)
    solo.append(*given([1] * 250))
    solo.append(*given([1] * 255, 250))
    for name in "bc":
        assert torch.equal(attended(cache, [name]), solo.attend(QUERY, solo.state())[0])


def test_rows_are_copied_only_where_others_go_on_together() -> None:
    """The same sequences in the same order keep their batch."""
    cache = made("rolling")
    entered(cache, "a")
    entered(cache, "b", PROMPT[:40])
    both = [x.expand(2, -1, -1, -1).contiguous() for x in given([1])]
    cache.append(["a", "b"], *both)
    batch = cache._sequences.line("a").batch
    cache.append(["a", "b"], *both)
    assert cache._sequences.line("b").batch is batch
    cache.append(["b", "a"], *both)
    assert cache._sequences.line("b").batch is not batch and cache._sequences.line("b").row == 0
