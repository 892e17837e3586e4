"""StaticCache: decoding one token a step in place, so that a CUDA graph may hold a step.

A QuantizedCache counts on the host, and every change of it makes a new state.  Here the counts are on the device, the
pages of all tokens to come are taken at once, and a step changes tensors where they are: it allocates nothing that
stays, waits for nothing, and launches the same kernels whatever the lengths are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from .errors import CacheError, ShapeError
from .inputs import checked_number, checked_pair, refuse_query
from .kernels import AttentionState, Room, Side
from .members import Member
from .pages import upload
from .scheme import SIDES
from .window import Window

if TYPE_CHECKING:
    from torch import Tensor

    from .quantized_cache import QuantizedCache


class Counts:
    """How far `batch` sequences are, int32 (B,) each, moved on in place; layers that hold the same tokens by the same
    windows share one.

    length    tokens, that of the step included
    packed    side -> u below this was packed before the step
    due       side -> u below this is packed behind it
    steps     int32 (): how many steps there ever were
    """

    def __init__(self, batch: int, capacity: int, device: torch.device) -> None:
        def counts() -> Tensor:
            return torch.zeros(batch, dtype=torch.int32, device=device)

        self.capacity, self.members, self.windows = capacity, tuple[Member, ...](), dict[Side, Window]()
        self.length = counts()
        self.packed: dict[Side, Tensor] = {side: counts() for side in SIDES}
        self.due: dict[Side, Tensor] = {side: counts() for side in SIDES}
        self.steps = torch.zeros((), dtype=torch.int32, device=device)

    def begin(self, members: Sequence[Member], windows: dict[Side, Window]) -> None:
        """Stand where these sequences do."""
        self.members, self.windows = tuple(members), windows
        self.length.copy_(upload([m.length for m in members], self.length.device))
        for side in SIDES:
            self.due[side].copy_(upload([m.packed_of(side) for m in members], self.length.device))

    def advance(self) -> None:
        """One token more of every sequence.  At the capacity the last token is written over again: `settle` tells."""
        self.steps.add_(1)
        self.length.add_(1).clamp_(max=self.capacity)
        for side, window in self.windows.items():
            self.packed[side].copy_(self.due[side])
            torch.maximum(self.due[side], window.packed_there(self.length), out=self.due[side])


class StaticCache:
    """Decoding behind a QuantizedCache, up to `capacity` tokens a sequence, those that it holds included.

    `begin` takes its state over and `settle` gives it back; between the two the cache itself stands still.  All tensors
    are made here, once: a graph of `step` is good for any number of `begin`s.  `counts` are those of a layer before,
    which moves them on for this one too.  Raises BackendError for kernels that pack by positions, CacheError for
    counts of another capacity.
    """

    def __init__(self, cache: QuantizedCache, capacity: int, counts: Counts | None = None) -> None:
        checked_number("capacity", capacity, max(1, *cache.lengths))
        cache.kernels.refuse_positions()
        if counts is not None and counts.capacity != capacity:
            raise CacheError(
                f"counts: of a capacity of {counts.capacity} tokens, this is {capacity}; give both the same"
            )
        now, size = cache.mark(), cache.kernels.page_tokens
        self.cache, self.capacity, self._owns_counts = cache, capacity, counts is None
        self.counts = counts or Counts(cache.batch, capacity, cache.device)
        self._members, self._steps = tuple[Member, ...](), torch.zeros_like(self.counts.steps)  # where it began
        table = torch.zeros(cache.batch, -(-capacity // size) + 1, dtype=torch.int32, device=cache.device)
        self._room = Room(
            pool=cache.pool.bytes, table=table, key_rows=torch.zeros_like(now.key_rows),
            value_rows=torch.zeros_like(now.value_rows), length=self.counts.length, packed=self.counts.packed,
            due=self.counts.due, most={side: window.step for side, window in now.policy.windows.items()},
        )  # fmt: skip
        before = self.counts.packed if now.policy.exact else self.counts.due
        self._state = AttentionState(
            pool=cache.pool.bytes, table=table, packed_keys=before["keys"], packed_values=before["values"],
            length=self.counts.length, key_rows=self._room.key_rows, value_rows=self._room.value_rows,
            first=torch.zeros_like(now.zeros), start=torch.zeros_like(now.start), longest=capacity,
            packed_most=max(0, capacity - now.policy.sinks), scaling=now.key_rows.shape[3] ** -0.5,
            window=now.policy.sliding,
        )  # fmt: skip

    def begin(self) -> None:
        """Stand where the cache does, with pages for all tokens up to the capacity.

        CacheError where the pool has not that many, the shared counts are of other tokens, or `record` has changed how
        many exact rows the cache keeps; nothing has changed then.
        """
        cache = self.cache
        now = cache.mark()
        here = now.members, now.policy.windows
        if not self._owns_counts and (self.counts.members, self.counts.windows) != here:
            raise CacheError("counts: the layer that moves them on holds other tokens; let each have its own")
        if now.key_rows.shape != self._room.key_rows.shape:
            raise CacheError("cache: it keeps more exact rows since record(); make another StaticCache")
        now = cache.reserve(self.capacity)
        if self._owns_counts:
            self.counts.begin(*here)
        self._members = now.members
        self._steps.copy_(self.counts.steps)
        width = min(now.table.tensor.shape[1], self._room.table.shape[1])
        self._room.table.zero_()
        self._room.table[:, :width].copy_(now.table.tensor[:, :width])
        self._room.key_rows.copy_(now.key_rows)
        self._room.value_rows.copy_(now.value_rows)
        self._state.start.copy_(now.start)

    def step(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        scaling: float | None = None,
        softcap: float | None = None,
        splits: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One token: append keys and values (B, H, 1, D), then attention of query (B, Hq, 1, D) over all of them, the
        token itself included: (out like query, lse (B, Hq, 1) float32).  Raises ShapeError."""
        cache = self.cache
        refuse_query(query, cache.batch, cache.kernels.shape, cache.device)
        if set(checked_pair(keys, values, None, cache.batch, cache.kernels, cache.device)) != {1}:
            raise ShapeError(f"keys: {keys.shape[2]} tokens; a step takes one")
        with torch.no_grad():
            if self._owns_counts:
                self.counts.advance()
            cache.kernels.append(keys, values, self._room, cache.params)
            given = self._state.scaling if scaling is None else scaling
            state = replace(self._state, scaling=given, softcap=softcap)
            return cache.kernels.attend(query, state, cache.params, cache.splits if splits is None else splits)

    def settle(self) -> None:
        """Tell the cache what came since `begin`: waits for the device.  `begin` goes on from there.  CacheError, with
        what fits told, where more tokens came than the capacity."""
        before, steps = self._members, int(self.counts.steps - self._steps)
        if before != self.cache.mark().members:
            raise CacheError("cache: changed since begin(), or told already; begin() again")
        counts = [min(steps, self.capacity - m.length) for m in before]
        self.cache.grown(counts, self._room.key_rows.clone(), self._room.value_rows.clone())
        if lost := max(0, *(steps - count for count in counts)):
            raise CacheError(f"capacity: {self.capacity} tokens; {lost} more came, each in the place of the one before")
