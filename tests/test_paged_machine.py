"""A paged cache against a dict of token lists: sequences come, grow, fork, wait elsewhere and go, in any order."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from cache_cases import same
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from paged_cases import LONGEST, QUERY, alone, attended, made, stepped, told

from kvdsl.allocator import LeastRecent
from kvdsl.errors import CacheError


@dataclass(frozen=True)
class Line:
    """The tokens that a sequence has, and those of its prompt that are still to come."""

    tokens: tuple[int, ...]
    coming: tuple[int, ...] = ()


class Machine(RuleBasedStateMachine):
    """Every sequence whose prompt is there attends as it would alone, and every page is free, cached, or held."""

    scheme = "rolling"
    preempt = False

    @initialize(pages=st.integers(4, 12))
    def build(self, pages: int) -> None:
        self.cache = made(self.scheme, pages, eviction=LeastRecent(self.preempt))
        self.lines: dict[int, Line] = {}
        self.next = 0
        self.folder = TemporaryDirectory()

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.folder.cleanup()

    def here(self) -> list[int]:
        return [name for name in self.lines if name not in self.cache.swapped]

    def refused(self, before: object) -> None:
        assert same(before, told(self.cache))

    def begun(self, stem: int, length: int, turn: int) -> None:
        tokens = tuple(stem if place < turn else 2 for place in range(length))
        before = self.cache.found(tokens)
        found = self.cache.add(self.next, tokens)
        assert found == before < length
        self.lines[self.next] = Line(tokens[:found], tokens[found:])
        self.next += 1

    @precondition(lambda self: len(self.lines) < 6)
    @rule(stem=st.integers(0, 1), length=st.sampled_from([1, 70, 150]))
    def begin(self, stem: int, length: int) -> None:
        self.begun(stem, length, length)

    @rule(
        stem=st.integers(0, 1), length=st.sampled_from([70, 140, 150, 220]), turn=st.sampled_from([40, 100, 300, 300])
    )
    def request(self, stem: int, length: int, turn: int) -> None:
        """A whole prompt; where six are there, the oldest one is finished."""
        if len(self.lines) >= 6:
            self.gone(min(self.lines))
        self.begun(stem, length, turn)
        line = self.lines[self.next - 1]
        self.step([self.next - 1], [Line(line.tokens + line.coming)], both=True)

    def names(self, data: st.DataObject) -> list[int]:
        return data.draw(st.lists(st.sampled_from(self.here()), min_size=1, max_size=4, unique=True))

    @precondition(lambda self: self.here())
    @rule(data=st.data(), chunk=st.sampled_from([1, 5, 64, 70, 150]), whole=st.booleans(), both=st.booleans())
    def append(self, data: st.DataObject, chunk: int, whole: bool, both: bool) -> None:
        names, after = self.names(data), []
        for name in names:
            line = self.lines[name]
            if line.coming:
                count = len(line.coming) if whole else min(chunk, len(line.coming))
                after.append(Line(line.tokens + line.coming[:count], line.coming[count:]))
            else:
                more = min(chunk, LONGEST - len(line.tokens)) if data.draw(st.booleans()) else 0
                after.append(replace(line, tokens=line.tokens + (name % 2,) * more))
        self.step(names, after, both)

    def step(self, names: list[int], after: list[Line], both: bool) -> None:
        begun = [len(self.lines[name].tokens) for name in names]
        fresh = [line.tokens[begin:] for line, begin in zip(after, begun, strict=True)]
        keys, values, counts = stepped([(list(line.tokens), n) for line, n in zip(after, begun, strict=True)])
        before = told(self.cache)
        try:
            if both:
                query = QUERY[:, :, :1].expand(len(names), -1, -1, -1).contiguous()
                self.cache.append_and_attend(names, query, keys, values, counts=counts, tokens=fresh)
            else:
                self.cache.append(names, keys, values, counts=counts, tokens=fresh)
        except CacheError as error:
            assert "are free" in str(error)
            self.refused(before)
        else:
            self.lines |= dict(zip(names, after, strict=True))

    @precondition(lambda self: self.here() and len(self.lines) < 6)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.here()))
        self.cache.fork(name, self.next)
        self.lines[self.next] = self.lines[name]
        self.next += 1

    @precondition(lambda self: self.lines)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        self.gone(data.draw(st.sampled_from(list(self.lines))))

    def gone(self, name: int) -> None:
        self.cache.free(name)
        del self.lines[name]

    @precondition(lambda self: self.here())
    @rule(data=st.data(), disk=st.booleans())
    def swap_out(self, data: st.DataObject, disk: bool) -> None:
        name = data.draw(st.sampled_from(self.here()))
        self.cache.swap_out(name, Path(self.folder.name) / str(name) if disk else None)
        with pytest.raises(CacheError, match=r"swap_in\("):
            attended(self.cache, [name])

    @precondition(lambda self: self.cache.swapped)
    @rule(data=st.data())
    def swap_in(self, data: st.DataObject) -> None:
        before = told(self.cache)
        try:
            self.cache.swap_in(data.draw(st.sampled_from(self.cache.swapped)))
        except CacheError as error:
            assert "are free" in str(error)
            self.refused(before)

    @precondition(lambda self: len(self.cache.pool.cached) > 4)
    @rule()
    def forget(self) -> None:
        self.cache.forget()
        assert not self.cache.pool.cached

    @precondition(lambda self: self.here())
    @rule(data=st.data())
    def attend(self, data: st.DataObject) -> None:
        names = self.names(data)
        out = attended(self.cache, names)
        for b, name in enumerate(names):
            if not self.lines[name].coming:
                assert torch.equal(out[b : b + 1], alone(self.scheme, self.lines[name].tokens)[0])

    @invariant()
    def holds_the_tokens(self) -> None:
        if not hasattr(self, "cache"):
            return
        assert set(self.cache.names) == set(self.lines)
        for name, line in self.lines.items():
            assert self.cache.length(name) == len(line.tokens)
            if name not in self.cache.swapped and not line.coming:
                right = alone(self.scheme, line.tokens)[1]
                assert all(
                    torch.equal(self.cache.pool.bytes[page], bytes_)
                    for page, bytes_ in zip(self.cache.pages(name), right, strict=False)
                )

    @invariant()
    def counts_every_byte(self) -> None:
        if not hasattr(self, "cache"):
            return
        pool, stats = self.cache.pool, self.cache.stats()
        held = Counter(page for name in self.lines for page in self.cache.pages(name))
        assert {page: pool.holders(page) for page in held} == held and pool.in_use == len(held) == stats["pages_used"]
        assert not set(pool.cached) & held.keys() and all(not pool.holders(page) for page in pool.cached)
        assert stats["pages_free"] >= 0 and stats["references"] == held.total()
        parts = sum(stats[f"bytes_{part}"] for part in ("zero", "free", "used", "cached"))
        assert parts == stats["bytes"] == pool.bytes.nbytes and not pool.bytes[0].any()
        assert {place for name in self.lines for place, page in enumerate(self.cache.pages(name)) if not page} == set()
        before = (pool.in_use, pool.cached, pool.left)
        pool.recount()
        assert (pool.in_use, pool.cached, pool.left) == before


def _case(name: str, preempt: bool) -> type:
    machine = type(f"Machine_{name}", (Machine,), {"scheme": name, "preempt": preempt})
    case = machine.TestCase  # type: ignore[attr-defined]
    case.settings = settings(
        max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
    )
    return case


TestWhole, TestRolling = _case("whole", False), _case("rolling", True)
TestBare, TestStored = _case("bare", True), _case("stored", False)
