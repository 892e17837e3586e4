"""Sequences that come and go over one pool: each is a row of a batch, and those of one step stand side by side.

A step is one call of kernels over a batch.  As long as the same sequences go on together, their batch stays and nothing
is moved; where others are asked for, their exact rows are copied into a batch of their own.  Pages never move.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from torch import Tensor

from .allocator import ZERO, Resident
from .deflated import deflated, inflated, refuse_level
from .errors import CacheError
from .members import Member
from .prefixes import Key
from .quantized_cache import QuantizedCache
from .saving import read
from .snapshot import restore, snapshot
from .state import Now

Name = Hashable
Away = Path | tuple[dict[str, Any], Mapping[str, Tensor]]
"""Where a sequence is that is swapped out: a file, or a snapshot in host memory."""


@dataclass(eq=False)
class Line:
    """One sequence: row `row` of `batch` (None: swapped out, to `away`), the keys of its tokens as far as they are
    known, the links of its full pages, and when it was used last."""

    batch: QuantizedCache | None
    row: int = 0
    keys: list[Key] = field(default_factory=list)
    chain: list[bytes] = field(default_factory=list)
    salt: Key = ""
    used: int = 0
    length: int = 0
    away: Away | None = None

    @property
    def here(self) -> QuantizedCache:
        """Its batch; only of one that is not swapped out."""
        assert self.batch is not None
        return self.batch

    @property
    def member(self) -> Member:
        """Its numbers."""
        return self.here.mark().members[self.row]

    @property
    def pages(self) -> tuple[int, ...]:
        """Its pages in order."""
        return self.here.mark().table.ids[self.row]

    def alone(self) -> Now:
        """A copy of its state; the pages are not copied."""
        return self.here.mark().chosen([self.row])


class Sequences:
    """All sequences by name; the owner of their pages.  `base` is a cache without sequences, whose pool they share."""

    def __init__(self, base: QuantizedCache) -> None:
        self.base = base
        self.lines: dict[Name, Line] = {}
        self.preempted = 0
        self._batches: list[QuantizedCache] = []
        self._stepping: set[Name] = set()
        self._time = 0
        base.pool.owners.add(self)
        base.pool.room = self._room

    def held(self) -> Iterator[int]:
        """The pages of all sequences, each as often as it is held."""
        return (page for batch in self._batches for page in batch.held())

    @property
    def nbytes(self) -> int:
        """Bytes of exact rows, tables and lengths."""
        return sum(batch.mark().nbytes for batch in self._batches)

    @property
    def swapped_bytes(self) -> int:
        """Bytes of sequences in host memory."""
        stored = [line.away[1] for line in self.lines.values() if isinstance(line.away, tuple)]
        return sum(x.nbytes for tensors in stored for x in tensors.values())

    def tick(self) -> int:
        """A number above all before: a time for `Line.used`."""
        self._time += 1
        return self._time

    def line(self, name: Name) -> Line:
        """CacheError where there is none."""
        if name not in self.lines:
            raise CacheError(f"sequence {name!r}: there is none of this name; add({name!r}) makes it")
        return self.lines[name]

    def resident(self, name: Name) -> Line:
        """CacheError where there is none, or where it is swapped out."""
        line = self.line(name)
        if line.batch is None:
            raise CacheError(f"sequence {name!r}: it is swapped out; swap_in({name!r}) brings it back")
        return line

    def refuse_taken(self, name: Name) -> None:
        """CacheError where there is a sequence of this name."""
        if name in self.lines:
            raise CacheError(f"sequence {name!r}: there is one of this name; free it first, or take another name")

    def open(self, now: Now) -> QuantizedCache:
        """A batch in that state, whose pages count from now on."""
        batch = self.base.beside(now)
        self._batches.append(batch)
        return batch

    def close(self, batch: QuantizedCache) -> None:
        """A batch whose sequences are gone."""
        self._batches = [one for one in self._batches if one is not batch]

    def together(self, names: Sequence[Name]) -> QuantizedCache:
        """The batch of these sequences in this order, and of no others."""
        lines = [self.resident(name) for name in names]
        if twice := [name for name, times in Counter(names).items() if times > 1]:
            raise CacheError(f"names: {twice[0]!r} stands there more than once; a step takes each sequence once")
        if not lines:
            return self.base
        if lines[0].here.batch == len(lines):
            batch = lines[0].here
            if all(line.batch is batch and line.row == row for row, line in enumerate(lines)):
                return batch
        parts = [(batch, [line.row for line in run]) for batch, run in groupby(lines, lambda line: line.here)]
        chosen = [batch.mark().chosen(rows) for batch, rows in parts]
        joined = Now.joined(chosen)
        self._leave(lines)
        batch = self.open(joined)
        for row, line in enumerate(lines):
            line.batch, line.row = batch, row
        return batch

    def out(self, line: Line) -> None:
        """The sequence leaves its batch, and holds no pages any more."""
        pages = line.pages
        self._leave([line])
        line.batch = None
        # What ends a chain is of no use without what begins it, so it is the first to go.
        self.base.pool.release(reversed(pages))

    def swap_out(self, line: Line, path: Path | None, deflate: int | None = None) -> None:
        """Copy a sequence to host memory or a file, its pages as streams of a level of DEFLATE or as they are, and let
        it go of them."""
        refuse_level(deflate)
        single = self.base.beside(line.alone())
        away: Away
        if path is None:
            away = deflated(*snapshot(single), deflate)
        else:
            single.save(path, deflate=deflate)
            away = path
        line.length = line.member.length
        self.out(line)
        line.away = away

    def swap_in(self, name: Name, line: Line) -> None:
        """The sequence as it was, in pages of its own."""
        if line.away is None:
            raise CacheError(f"sequence {name!r}: it is not swapped out; there is nothing to bring back")
        document, tensors = inflated(*line.away) if isinstance(line.away, tuple) else read(line.away, self.base.kernels)
        if [row[0] for row in document["members"]] != [line.length]:
            raise CacheError(f"{line.away}: it holds another sequence than {name!r} of {line.length} tokens")
        batch = self.open(Now.empty(self.base.mark().policy, 1, self.base.kernels, self.base.device))
        try:
            restore(batch, document, tensors)
        except BaseException:
            self.close(batch)
            raise
        line.batch, line.row, line.away, line.used = batch, 0, None, self.tick()

    @contextmanager
    def stepping(self, names: Sequence[Name]) -> Iterator[None]:
        """Within, these sequences are not given up."""
        self._stepping = set(names)
        try:
            yield
        finally:
            self._stepping = set()

    def _room(self, missing: int) -> None:
        """Preempt sequences that free the missing pages; none where those that are named do not."""
        pool = self.base.pool
        lines = {n: one for n, one in self.lines.items() if one.batch is not None and n not in self._stepping}
        order = sorted(lines, key=lambda name: lines[name].used)
        held = {name: Counter(page for page in lines[name].pages if page != ZERO) for name in order}
        residents = [
            Resident(name, len(held[name]), sum(pool.holders(page) == 1 for page in held[name])) for name in order
        ]
        chosen = list(dict.fromkeys(pool.eviction.sequences(residents, missing)))
        if unknown := [name for name in chosen if name not in lines]:
            raise CacheError(f"eviction: sequences() gave {unknown[0]!r}, which is none of those it was asked about")
        going: Counter[int] = sum((held[name] for name in chosen), Counter())
        if chosen and sum(times == pool.holders(page) for page, times in going.items()) >= missing:
            for name in chosen:
                self.swap_out(lines[name], None)
                self.preempted += 1

    def _leave(self, lines: Sequence[Line]) -> None:
        """Make rows of the other sequences of their batches; theirs are gone."""
        going = set(map(id, lines))
        rests = []
        for batch in {id(line.batch): line.here for line in lines}.values():
            rest = [one for one in self.lines.values() if one.batch is batch and id(one) not in going]
            rests.append((batch, rest, batch.mark().chosen([one.row for one in rest]) if rest else None))
        for batch, rest, now in rests:
            if now is None:
                self.close(batch)
            else:
                batch._now = now
                for row, one in enumerate(rest):
                    one.row = row
