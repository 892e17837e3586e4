"""A cache against a list of tokens: random appends, crops, copies, saves, in any order."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from cache_cases import DIM, HEADS, SCHEMES, attention, compiled, numbers
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor

from kvdsl.quantized_cache import QuantizedCache
from kvdsl.scheme import SIDES, Scheme
from kvdsl.window import windows


@dataclass(frozen=True)
class Line:
    """One sequence: its tokens (H, n, D), the most it ever had, how far back a crop may lose nothing at best, and
    whether no crop ever lost something."""

    keys: Tensor
    values: Tensor
    peak: int = 0
    safe: int = 0
    clean: bool = True

    @property
    def length(self) -> int:
        return self.keys.shape[1]


EMPTY = Line(torch.empty(HEADS, 0, DIM), torch.empty(HEADS, 0, DIM))


class Machine(RuleBasedStateMachine):
    """After every step the cache holds what a fresh one would hold that was given each sequence's tokens at once."""

    scheme: Scheme = SCHEMES["bare"]

    def __init__(self) -> None:
        super().__init__()
        self.kernels = compiled(self.scheme)
        self.cache = QuantizedCache(self.kernels, 2, capacity=4096)
        self.lines = [EMPTY, EMPTY]
        self.draft = 0
        self.seed = 0

    def tokens(self, chunk: int) -> list[Tensor]:
        self.seed += 2
        return [numbers(len(self.lines), chunk, seed=self.seed + i) for i in range(2)]

    @rule(data=st.data(), chunk=st.sampled_from([0, 1, 1, 1, 2, 7, 16, 17, 40, 75]), ragged=st.booleans())
    def append(self, data: st.DataObject, chunk: int, ragged: bool) -> None:
        keys, values = self.tokens(chunk)
        size = len(self.lines)
        counts = data.draw(st.lists(st.integers(0, chunk), min_size=size, max_size=size)) if ragged else [chunk] * size
        self.cache.append(keys, values, counts=counts if ragged else None)
        for b, count in enumerate(counts):
            line, at = self.lines[b], chunk - count
            self.lines[b] = replace(
                line,
                keys=torch.cat([line.keys, keys[b, :, at:]], 1),
                values=torch.cat([line.values, values[b, :, at:]], 1),
                peak=max(line.peak, line.length + count),
            )

    @rule(data=st.data())
    def crop_draft(self, data: st.DataObject) -> None:
        back = data.draw(st.integers(0, max(0, self.draft)))
        lengths = [min(line.length, max(line.safe, line.peak - back)) for line in self.lines]
        self.cache.crop(lengths, requantize=False) if all(line.clean for line in self.lines) else self.cache.crop(
            lengths
        )
        self.cut(lengths)

    @rule(length=st.integers(0, 150))
    def crop(self, length: int) -> None:
        self.cache.crop(length)
        lengths = [min(length, line.length) for line in self.lines]
        for b, (line, n) in enumerate(zip(self.lines, lengths, strict=True)):
            if n < min(line.length, max(line.safe, line.peak - self.draft)):
                self.lines[b] = replace(line, clean=False)
        self.cut(lengths)

    def cut(self, lengths: list[int]) -> None:
        self.lines = [
            replace(line, keys=line.keys[:, :n], values=line.values[:, :n], safe=min(line.safe, n))
            for line, n in zip(self.lines, lengths, strict=True)
        ]

    @rule(draft=st.sampled_from([0, 3, 20]))
    def record(self, draft: int) -> None:
        self.cache.record(draft)
        if draft > self.draft:
            self.lines = [replace(line, safe=line.length) for line in self.lines]
        self.draft = draft

    @rule(data=st.data())
    def choose(self, data: st.DataObject) -> None:
        index = data.draw(st.lists(st.integers(0, len(self.lines) - 1), min_size=1, max_size=3))
        self.cache.reorder(index)
        self.lines = [self.lines[i] for i in index]

    @rule(b=st.integers(0, 2))
    def fork(self, b: int) -> None:
        """Go on with a fork; its origin writes once more and is dropped."""
        b %= len(self.lines)
        origin = self.cache
        self.cache = origin.fork([b])
        origin.append(*self.tokens(30))
        self.lines = [self.lines[b]]

    @rule()
    def reload(self) -> None:
        with TemporaryDirectory() as folder:
            self.cache.save(Path(folder) / "c")
            self.cache = QuantizedCache.load(Path(folder) / "c", self.kernels, capacity=4096)
        self.lines = [replace(line, safe=line.length, peak=line.length) for line in self.lines]

    @rule()
    def reset(self) -> None:
        self.cache.reset()
        self.lines = [EMPTY] * len(self.lines)

    @precondition(lambda self: all(line.length and line.clean for line in self.lines))
    @rule()
    def attend(self) -> None:
        query = numbers(len(self.lines), 1, heads=4, seed=self.seed)
        out, _ = self.cache.attend(query, self.cache.state())
        dense = [self.cache.dense(side) for side in SIDES]
        for b, line in enumerate(self.lines):
            keys, values = (d[b : b + 1, :, d.shape[2] - line.length :] for d in dense)
            torch.testing.assert_close(
                out[b : b + 1].double(), attention(query[b : b + 1], keys, values), rtol=1e-4, atol=1e-4
            )

    @invariant()
    def holds_the_tokens(self) -> None:
        cache = self.cache
        assert cache.lengths == tuple(line.length for line in self.lines)
        dense = {side: cache.dense(side) for side in SIDES}
        for b, line in enumerate(self.lines):
            given = {"keys": line.keys, "values": line.values}
            fresh = QuantizedCache(self.kernels, 1, capacity=4096)
            fresh.append(line.keys[None], line.values[None])
            for side in SIDES:
                mine = dense[side][b, :, dense[side].shape[2] - line.length :]
                window = windows(self.scheme)[side]
                assert torch.equal(mine[:, : window.sinks], given[side][:, : window.sinks])
                if line.clean:
                    assert cache.packed(side)[b] == fresh.packed(side)[0]
                    assert torch.equal(mine, fresh.dense(side)[0])
                else:
                    assert cache.packed(side)[b] >= fresh.packed(side)[0]
                    assert not line.length or (mine - given[side]).abs().max() < 3

    @invariant()
    def counts_its_pages(self) -> None:
        pool = self.cache.pool
        counted = (pool.in_use, [pool.holders(page) for page in self.cache.held()])
        pool.recount()
        assert (pool.in_use, [pool.holders(page) for page in self.cache.held()]) <= counted
        assert not pool.bytes[0].any()


def _case(name: str) -> type:
    machine = type(f"Machine_{name}", (Machine,), {"scheme": SCHEMES[name]})
    case = machine.TestCase  # type: ignore[attr-defined]
    case.settings = settings(
        max_examples=25, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
    )
    return case


TestWhole, TestRolling, TestBare, TestStored = map(_case, ("whole", "rolling", "bare", "stored"))
