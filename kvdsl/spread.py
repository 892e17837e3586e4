"""Which rank holds which tokens of a sequence, and how many of them a query sees there: arithmetic on host integers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple


class Stretch(NamedTuple):
    """Neighbouring tokens on one rank, from token `begin` on; `before`: tokens of the rank's stretches before it."""

    rank: int
    begin: int
    before: int


class Piece(NamedTuple):
    """Queries [first, last) of a step, and what they see on a rank: the last one its first `seen` tokens, as do all of
    the last `behind`, which stand behind these; of the others each sees a token less than the next."""

    first: int
    last: int
    seen: int
    behind: int


FIRST = (Stretch(0, 0, 0),)


@dataclass(frozen=True)
class Spread:
    """One sequence over `ranks` ranks.  A stretch takes `turn` tokens, so that it begins at a page; of a longer step so
    many whole turns that every rank gets one stretch.  The first one holds the sinks, too.

    length      tokens so far
    end         the token at which the last stretch is full
    stretches   in order; the first one is rank 0's
    """

    ranks: int
    turn: int
    sinks: int
    length: int = 0
    end: int = -1
    stretches: tuple[Stretch, ...] = FIRST

    def grown(self, count: int) -> Spread:
        """With `count` tokens more: what the last stretch has no room for goes to the ranks behind it, in turn."""
        if not count:
            return self
        length, end, stretches = self.length + count, self.end, list(self.stretches)
        size = self._size(length - max(end, self.sinks))
        if end < 0:
            end = self.sinks + size
        while end < length:
            rank = (stretches[-1].rank + 1) % self.ranks
            before = next((_until(stretches, i, end) for i in _of(stretches, rank)), 0)
            stretches.append(Stretch(rank, end, before))
            end += size
        return replace(self, length=length, end=end, stretches=tuple(stretches))

    def _size(self, tokens: int) -> int:
        """Tokens of each stretch, where so many have no place yet."""
        return self.turn * max(1, -(-tokens // (self.ranks * self.turn)))

    def held(self, rank: int, token: int | None = None) -> int:
        """How many of the tokens before `token` (default: of all) a rank holds."""
        token = self.length if token is None else min(token, self.length)
        places = (i for i in _of(self.stretches, rank) if self.stretches[i].begin < token)
        return next((_until(self.stretches, i, token) for i in places), 0)

    def runs(self, rank: int, token: int) -> list[tuple[int, int]]:
        """The tokens from `token` on that a rank holds, as ranges [begin, end) in order."""
        found: list[tuple[int, int]] = []
        for i in _of(self.stretches, rank):
            begin, end = self.stretches[i].begin, _end(self.stretches, i, self.length)
            if end <= token:
                break
            if max(begin, token) < end:
                found.insert(0, (max(begin, token), end))
        return found

    def pieces(self, rank: int, queries: int) -> tuple[Piece, ...]:
        """What the newest `queries` positions see on a rank.

        Those that stand in a stretch of the rank see a token more each, those between two of them all the same: so a
        piece begins where a stretch does.
        """
        first = self.length - queries  # below 0 where queries of padding stand before the sequence
        runs = [(begin - first, end - first) for begin, end in self.runs(rank, max(0, first))]
        cuts = sorted({0, *(begin for begin, _ in runs), queries})
        found = []
        for start, stop in zip(cuts, cuts[1:], strict=False):
            grows = max((min(end, stop) for begin, end in runs if begin == start), default=start)
            found.append(Piece(start, stop, self.held(rank, first + stop), stop - grows))
        return tuple(found)


def _of(stretches: Sequence[Stretch], rank: int) -> Iterator[int]:
    """The places of a rank's stretches, the newest first."""
    return (i for i in range(len(stretches) - 1, -1, -1) if stretches[i].rank == rank)


def _end(stretches: Sequence[Stretch], i: int, length: int) -> int:
    return stretches[i + 1].begin if i + 1 < len(stretches) else length


def _until(stretches: Sequence[Stretch], i: int, token: int) -> int:
    """Tokens before `token` in stretch i, which begins before it, and in those of its rank before."""
    return stretches[i].before + min(token, _end(stretches, i, token)) - stretches[i].begin
