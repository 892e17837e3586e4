"""What routing knows of attention: queries that are kept until a decision asks them, or sums that are carried on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .scheme import Saliency, Scheme
from .tiers import Metric


@dataclass(frozen=True)
class Chunk:
    """Queries (B, Hq, n, D) of a step, of which those at [begin_b, end_b) are of sequence b."""

    query: Tensor
    begin: tuple[int, ...]
    end: tuple[int, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """Of each sequence."""
        return tuple(e - b for b, e in zip(self.begin, self.end, strict=True))


@dataclass(frozen=True)
class Watch:
    """The queries of the steps since the last decision, and how many of the newest are at hand of each sequence;
    nothing where no router asks for attention, and none where sums are carried on."""

    router: Saliency | None
    at_hand: tuple[int, ...]
    chunks: tuple[Chunk, ...] = ()

    @classmethod
    def of(cls, scheme: Scheme, batch: int) -> Watch:
        """Nothing seen yet."""
        return cls(scheme.router if isinstance(scheme.router, Saliency) else None, (0,) * batch)

    @property
    def sums(self) -> int:
        """How many numbers of each token are carried on."""
        return 0 if self.router is None else self.router.carried

    @property
    def nbytes(self) -> int:
        """Bytes of queries that are kept."""
        return sum(chunk.query.nbytes for chunk in self.chunks)

    def metric(self, first: bool) -> Metric:
        """What a decision goes by, `first`: the prompt's."""
        assert self.router is not None
        return self.router.metric if first or self.router.later is None else self.router.later

    def seen(self, query: Tensor, counts: Sequence[int], first: Sequence[bool]) -> Watch:
        """With the queries (B, Hq, Q, D) of one more step, the last counts_b of which are real; `first_b`: the first
        decision about sequence b is still to come."""
        if self.router is None or self.sums:
            return self
        if self.router.every == "prompt" and not any(first):
            return self
        newest = [self.metric(one) == "last" for one in first]
        at_hand = tuple(
            min(1, n + c) if last else n + c for n, c, last in zip(self.at_hand, counts, newest, strict=True)
        )
        if all(newest):
            query, counts = query[:, :, -1:], [min(1, count) for count in counts]
        width = query.shape[2]
        chunk = Chunk(query, tuple(width - count for count in counts), (width,) * len(counts))
        return replace(self, at_hand=at_hand, chunks=needed((*self.chunks, chunk), at_hand))

    def query(self) -> Tensor:
        """All queries that are kept, (B, Hq, N, D)."""
        return torch.cat([chunk.query for chunk in self.chunks], 2)

    def places(self) -> list[list[int]]:
        """Of each sequence the places of its queries that are at hand in `query`, the oldest first."""
        found, at = [list[int]() for _ in self.at_hand], 0
        for chunk in self.chunks:
            for row, begin, end in zip(found, chunk.begin, chunk.end, strict=True):
                row.extend(range(at + begin, at + end))
            at += chunk.query.shape[2]
        return [row[len(row) - n :] for row, n in zip(found, self.at_hand, strict=True)]

    def after(self, decided: Sequence[bool]) -> Watch:
        """Behind a decision about some sequences: their queries are done with.  What is kept is kept in tensors of its
        own, since a model's query may be a view of much more."""
        if not self.chunks:
            return self
        at_hand = tuple(0 if done else n for n, done in zip(self.at_hand, decided, strict=True))
        chunks = needed(self.chunks, at_hand)
        if chunks:
            chunks = (*chunks[:-1], replace(chunks[-1], query=chunks[-1].query.clone()))
        return replace(self, at_hand=at_hand, chunks=chunks)

    def cropped(self, counts: Sequence[int]) -> Watch:
        """Without the newest counts_b queries of each sequence, whose tokens are gone."""
        left, chunks = list(counts), list[Chunk]()
        for chunk in reversed(self.chunks):
            cut = [min(n, c) for n, c in zip(left, chunk.counts, strict=True)]
            left = [n - c for n, c in zip(left, cut, strict=True)]
            chunks.insert(0, replace(chunk, end=tuple(e - c for e, c in zip(chunk.end, cut, strict=True))))
        at_hand = tuple(max(0, n - c) for n, c in zip(self.at_hand, counts, strict=True))
        return replace(self, at_hand=at_hand, chunks=needed(tuple(chunks), at_hand))

    def chosen(self, index: Sequence[int]) -> Watch:
        """Of chosen sequences, in that order."""
        at = list(index)
        chunks = tuple(
            Chunk(one.query[at], tuple(one.begin[i] for i in at), tuple(one.end[i] for i in at)) for one in self.chunks
        )
        return replace(self, at_hand=tuple(self.at_hand[i] for i in at), chunks=chunks)


def needed(chunks: tuple[Chunk, ...], at_hand: Sequence[int]) -> tuple[Chunk, ...]:
    """The newest chunks, as many as hold the queries at hand of every sequence."""
    left, found = list(at_hand), list[Chunk]()
    for chunk in reversed(chunks):
        if max(left, default=0) > 0:
            found.insert(0, chunk)
            left = [n - c for n, c in zip(left, chunk.counts, strict=True)]
    return tuple(found)
