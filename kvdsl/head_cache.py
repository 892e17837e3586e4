"""HeadCache: one layer whose kv heads have schemes of their own, a cache for each group of like ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor

from .head_groups import HeadGroup, joined
from .kernels import Side


class Held(NamedTuple):
    """A group of heads, and the cache, of one scheme, that holds them: a QuantizedCache, or a TieredCache."""

    group: HeadGroup
    cache: Any


class HeadCache:
    """One layer's keys and values, group by group; see QuantizedCache for what each method does.

    groups    of all kv heads of a layer, each once
    """

    def __init__(self, groups: Sequence[Held]) -> None:
        self.groups = tuple(groups)

    # -- reading ------------------------------------------------------------------------------------------------------

    @property
    def batch(self) -> int:
        """Sequences."""
        return int(self.groups[0].cache.batch)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence."""
        return self.groups[0].cache.lengths

    @property
    def window(self) -> int | None:
        """The sliding window in tokens, or None."""
        return self.groups[0].cache.window

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(one.cache.nbytes for one in self.groups)

    def bits(self) -> float:
        """Bits held for each number of the keys and values seen so far, everything included."""
        return sum(one.cache.bits() * len(one.group.heads) / one.group.kv_heads for one in self.groups)

    def stats(self) -> dict[str, Any]:
        """bytes, bits, tokens, requantized_tokens of all groups; `groups`: the same of each, and its heads."""
        each = [{"heads": list(one.group.heads), **one.cache.stats()} for one in self.groups]
        again = sum(one["requantized_tokens"] for one in each)
        whole = {"bytes": self.nbytes, "bits": self.bits(), "tokens": sum(self.lengths), "requantized_tokens": again}
        return {**whole, "groups": each}

    def tuned(self, state: tuple[Any, ...], scaling: float, softcap: float | None, window: int | None) -> Any:
        """The states with the numbers of one call."""
        pairs = zip(self.groups, state, strict=True)
        return tuple(one.cache.tuned(own, scaling, softcap, window) for one, own in pairs)

    def attend(self, query: Tensor, state: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        """Attention of query (B, Hq, Q, D): (out (B, Hq, Q, D), lse (B, Hq, Q) float32)."""
        pairs = zip(self.groups, state, strict=True)
        found = [one.cache.attend(one.group.of(query), own) for one, own in pairs]
        out, lse = (self._joined(parts) for parts in zip(*found, strict=True))
        return out, lse

    def dense(self, side: Side) -> Tensor:
        """All tokens of a side as numbers, (B, H, longest, D), right aligned."""
        return self._joined([one.cache.dense(side) for one in self.groups])

    def _joined(self, parts: Sequence[Tensor]) -> Tensor:
        """Parts (B, heads, ...) of the groups in the order of the layer's heads."""
        return joined([one.group for one in self.groups], parts)

    # -- changing -----------------------------------------------------------------------------------------------------

    def append(self, keys: Tensor, values: Tensor, **options: Any) -> tuple[Any, ...]:
        """Add keys and values (B, H, m, D); returns what the attention of this step reads."""
        with self._together():
            return tuple(one.cache.append(one.group.of(keys), one.group.of(values), **options) for one in self.groups)

    def route(self, query: Tensor | None, state: tuple[Any, ...], lse: Tensor | None = None) -> None:
        """Behind a step's attention: groups with tiers send on what is due."""
        with self._together():
            for one, own in zip(self.groups, state, strict=True):
                asked, found = (None if x is None else one.group.of(x) for x in (query, lse))
                one.cache.route(asked, own, found)

    def append_and_attend(self, query: Tensor, keys: Tensor, values: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """One step: append, attention of query (B, Hq, Q, D), routing.  A failure in any undoes all."""
        with self._together():
            state = self.append(keys, values, **options)
            out, lse = self.attend(query, state)
            self.route(query, state, lse)
        return out, lse

    def crop(self, length: int | Sequence[int], *, requantize: bool = True) -> None:
        """Shorten every sequence to at most `length` tokens."""
        self._each(lambda cache: cache.crop(length, requantize=requantize))

    def record(self, draft: int) -> None:
        """Keep so many exact rows that cropping loses nothing down to `draft` tokens before the newest one."""
        self._each(lambda cache: cache.record(draft))

    def reorder(self, index: Sequence[int] | Tensor) -> None:
        """Sequence i becomes what sequence index_i was."""
        chosen = index.tolist() if isinstance(index, Tensor) else list(index)
        self._each(lambda cache: cache.reorder(chosen))

    select = reorder
    """The chosen sequences, in that order, any number of them."""

    def repeat(self, times: int) -> None:
        """Every sequence `times` times, the copies beside each other."""
        self._each(lambda cache: cache.repeat(times))

    def _each(self, change: Callable[[Any], None]) -> None:
        with self._together():
            for one in self.groups:
                change(one.cache)

    @contextmanager
    def _together(self) -> Iterator[None]:
        """A change of all groups, or of none."""
        marks = [one.cache.mark() for one in self.groups]
        try:
            yield
        except BaseException:
            for one, mark in zip(self.groups, marks, strict=True):
                one.cache.back(mark)
            raise
