"""What routing knows of attention: queries that are kept until a decision asks them, or sums that are carried on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .scheme import Saliency, Scheme
from .tiers import Metric


@dataclass(frozen=True)
class Watch:
    """The queries (B, Hq, n, D) of the steps since the last decision, and how many of the newest are at hand of each
    sequence; nothing where no router asks for attention, and none where sums are carried on."""

    router: Saliency | None
    at_hand: tuple[int, ...]
    chunks: tuple[Tensor, ...] = ()

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
        return sum(chunk.nbytes for chunk in self.chunks)

    def metric(self, first: bool) -> Metric:
        """What a decision goes by, `first`: the prompt's."""
        assert self.router is not None
        return self.router.metric if first or self.router.later is None else self.router.later

    def seen(self, query: Tensor, counts: Sequence[int], first: bool) -> Watch:
        """With the queries (B, Hq, Q, D) of one more step, the last counts_b of which are real."""
        if self.router is None or self.sums:
            return self
        if self.router.every is None and not first:
            return self
        if self.metric(first) == "last":
            return replace(self, at_hand=tuple(min(1, n + c) for n, c in zip(self.at_hand, counts, strict=True)),
                           chunks=(query[:, :, -1:],))  # fmt: skip
        at_hand = tuple(n + c for n, c in zip(self.at_hand, counts, strict=True))
        chunks, needed = [query], max(at_hand, default=0) - query.shape[2]
        for chunk in reversed(self.chunks):
            if needed > 0:
                chunks.insert(0, chunk)
                needed -= chunk.shape[2]
        return replace(self, at_hand=at_hand, chunks=tuple(chunks))

    def query(self) -> Tensor:
        """All queries that are kept, (B, Hq, N, D): of sequence b the last at_hand_b count."""
        return torch.cat(self.chunks, 2)

    def after(self, decided: Sequence[bool]) -> Watch:
        """Behind a decision about some sequences: their queries are done with.  What is kept is kept in tensors of its
        own, since a model's query may be a view of much more."""
        if not self.chunks:
            return self
        at_hand = tuple(0 if done else n for n, done in zip(self.at_hand, decided, strict=True))
        if not any(at_hand):
            return replace(self, at_hand=at_hand, chunks=())
        *old, newest = self.chunks
        return replace(self, at_hand=at_hand, chunks=(*old, newest.clone()))

    def chosen(self, index: Sequence[int]) -> Watch:
        """Of chosen sequences, in that order."""
        at_hand = tuple(self.at_hand[i] for i in index)
        return replace(self, at_hand=at_hand, chunks=tuple(chunk[list(index)] for chunk in self.chunks))
