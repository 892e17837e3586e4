"""One tier of a cache: which tokens it holds, in a packed cache of their own, and what is kept beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .feedback import fed, trip, weighed
from .inputs import DTYPES
from .kernels import KernelSet, Params, Places, Side
from .measuring import Affine, measure, nothing
from .quantized_cache import QuantizedCache
from .routing import column
from .saliency import Read
from .scheme import SIDES
from .segments import Segment
from .tier_kernels import TierSet

Tokens = dict[Side, Tensor]


@dataclass(frozen=True)
class Beside:
    """What stands beside the pages at one moment: factors and shifts of either side; of the token in place j of a
    sequence and head its position behind the sinks, int32 (B, H, room), and its sums, float32 (sums, B, H, room);
    `end`: no sequence was ever longer, sinks included; `weights`: what the queries of a sequence's first step weigh in
    errors of keys, float32 (B, H, rank, D), of rank 0 where these are not fed forward."""

    affine: dict[Side, Affine]
    positions: Tensor
    sums: Tensor
    weights: Tensor
    end: int = 0


class SegmentCache:
    """The tokens of one tier, of all sequences; each head has its own, and as many as the others."""

    def __init__(
        self, segment: Segment, kernels: TierSet, params: Params, batch: int, sums: int, device: torch.device,
        capacity: int, placed: bool = True, sinks: int = 0,
    ) -> None:  # fmt: skip
        self.segment, self.kernels, self.params, self.sinks = segment, kernels, params, sinks
        self.cache = QuantizedCache(kernels.packing, batch, device=device, params=params, capacity=capacity)
        shape, about = kernels.packing.shape, {side: segment.of(side) for side in SIDES}
        sizes = (batch, shape.kv_heads, shape.head_dim)
        affine = {side: nothing(one, sizes, device) for side, one in about.items() if one is not None}
        # Without a router a tier has all tokens in their order: none is told where it stood, unless kernels ask.
        self.placed = placed or kernels.reading.shape.placed
        positions = torch.zeros(batch, shape.kv_heads, 0, dtype=torch.int32, device=device)
        rank = 0 if segment.feedback is None else segment.feedback.rank
        weights = torch.zeros(batch, shape.kv_heads, rank, shape.head_dim, device=device)
        self.beside = Beside(affine, positions, torch.zeros(sums, batch, shape.kv_heads, 0, device=device), weights)
        self._no_rows = torch.empty(0)

    @property
    def counts(self) -> tuple[int, ...]:
        """Tokens of each sequence."""
        return self.cache.lengths

    @property
    def once(self) -> set[bool]:
        """Whether what is measured once is of those in the window, too: both, either, or nothing of the kind."""
        return {one.waiting for one in self.segment.measured if one is not None and one.once}

    @property
    def nbytes(self) -> int:
        """Bytes of pages, exact rows, tables, places, sums, and what is measured."""
        affine = sum(one.nbytes for one in self.beside.affine.values())
        return self.cache.nbytes + affine + self.beside.weights.nbytes + self.routing_bytes

    @property
    def routing_bytes(self) -> int:
        """Bytes of places and sums."""
        return self.beside.sums.nbytes + (self.beside.positions.nbytes if self.placed else 0)

    # -- changing -----------------------------------------------------------------------------------------------------

    def append(self, tokens: Tokens, counts: Sequence[int], positions: Tensor, sums: Tensor) -> None:
        """The last counts_b of the K tokens (B, H, K, D) of each side join, with their positions (B, H, K) and sums
        (sums, B, H, K)."""
        if not any(counts):
            return
        self._note(self.counts, counts, positions, sums)
        self.cache.append(*self._coded(tokens), counts=counts, places=self._places())

    def rebuild(self, tokens: Tokens, counts: Sequence[int], positions: Tensor, sums: Tensor, due: Sequence[bool],
                query: Tensor | None) -> None:  # fmt: skip
        """Of sequences that are due these tokens take the place of all; what is measured of them is measured anew, of
        the last counts_b of K.  The other sequences have a count of 0."""
        self.cache.crop([0 if one else n for one, n in zip(due, self.counts, strict=True)])
        self.measured(tokens, counts, due, query, once=False)
        self.append(tokens, counts, positions, sums)

    def measured(self, tokens: Tokens, counts: Sequence[int], due: Sequence[bool], query: Tensor | None,
                 *, once: bool, waiting: bool = False) -> None:  # fmt: skip
        """Measure the last counts_b of K tokens, of sequences that are due: what is measured `once`, with those in the
        window (`waiting`) or without, or what is measured at every flush."""
        affine = dict(self.beside.affine)
        for side, old in affine.items():
            about, x = self.segment.of(side), tokens[side]
            assert about is not None
            if (about.once, about.waiting) != (once, waiting):
                continue
            place = torch.arange(x.shape[2], device=x.device)
            valid = place >= x.shape[2] - column(counts, x.device)
            if x.shape[2]:
                which = column(due, x.device)[:, 0] > 0
                affine[side] = old.where(which, measure(about, x, valid, query))
        self.beside = replace(self.beside, affine=affine)

    def weigh(self, query: Tensor, begun: Sequence[bool]) -> None:
        """Of sequences that have begun errors of keys are weighed by their queries (B, Hq, Q, D) from now on."""
        part, old = self.segment.feedback, self.beside.weights
        if part is not None:
            which = column(begun, old.device)[..., None, None] > 0
            weights = torch.where(which, weighed(part, query, old.shape[1]), old)
            self.beside = replace(self.beside, weights=weights)

    def _coded(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Keys and values as they are packed, in the dtype of the packing kernels."""
        affine, part, kernels = self.beside.affine, self.segment.feedback, self.kernels.packing
        keys, values = (affine[side].taken(tokens[side]) if side in affine else tokens[side] for side in SIDES)
        dtype = self.cache.rows("keys").dtype
        if part is not None:
            page = kernels.page_tokens
            keys = fed(part, self.beside.weights, keys, lambda x: trip(kernels, x, self.params), page)
        return keys.to(dtype).contiguous(), values.to(dtype).contiguous()

    def _note(self, before: Sequence[int], counts: Sequence[int], positions: Tensor, sums: Tensor) -> None:
        """Write where the new tokens stood, and their sums, behind those of the old ones."""
        beside, device = self.beside, positions.device
        room, needed = beside.positions.shape[2], max(n + c for n, c in zip(before, counts, strict=True)) + 1
        if needed > room:
            more = max(needed, 2 * room) - room
            grown = [torch.nn.functional.pad(x, (0, more)) for x in (beside.positions, beside.sums)]
            room += more
            if not self.placed:
                grown[0] = torch.arange(room, dtype=torch.int32, device=device).expand(*positions.shape[:2], -1)
            self.beside = beside = replace(beside, positions=grown[0], sums=grown[1])
        place = torch.arange(positions.shape[2], device=device) - (positions.shape[2] - column(counts, device))
        # The last place is nobody's: what does not count goes there.
        at = torch.where(place < 0, room - 1, place + column(before, device))[:, None].expand_as(positions)
        if self.placed:
            beside.positions.scatter_(2, at, positions.to(torch.int32))
        beside.sums.scatter_(3, at.expand_as(sums), sums)

    def reserve(self, counts: Sequence[int]) -> None:
        """Places for counts_b more tokens, each still a vector of zeros; all pages become the cache's own."""
        heads, most = self.beside.positions.shape[1], max(counts, default=0)
        if most:
            like = self.cache.rows("keys")
            zeros = like.new_zeros(like.shape[0], heads, most, like.shape[3])
            nowhere = torch.zeros(like.shape[0], heads, most, dtype=torch.int64, device=like.device)
            sums = self.beside.sums.new_zeros(len(self.beside.sums), *nowhere.shape)
            self.append({"keys": zeros, "values": zeros}, counts, nowhere, sums)
        self.cache.own()

    def put(self, slots: Tensor, live: Tensor, tokens: Tokens, positions: Tensor, sums: Tensor) -> None:
        """Tokens (B, H, K, D), at positions, take the places `slots` (B, H, K) of each head, where they are live."""
        single, size = self._single(), self._single().page_tokens
        coded = dict(zip(SIDES, self._coded(tokens), strict=True))
        for k in range(slots.shape[2]):
            (pool, table), at = self._pages(slots[:, :, k : k + 1]), (slots[:, :, k].flatten() % size).to(torch.int32)
            end = at + live[:, :, k].flatten().to(torch.int32)
            places = self._single_places(positions[:, :, k])
            for side in SIDES:
                rows = coded[side][:, :, k].flatten(0, 1)[:, None, None].contiguous()
                single.pack(side, rows, at, 0, at, end, (0, size), pool, table, self.params, places)
        room = self.beside.positions.shape[2]
        at = torch.where(live, slots, room - 1)
        self.beside.positions.scatter_(2, at, positions.to(torch.int32))
        self.beside.sums.scatter_(3, at.expand_as(sums), sums)

    # -- reading ------------------------------------------------------------------------------------------------------

    def read(self, asked: Tensor | None = None) -> Read:
        """What a query that sees all tokens reads, or, where tokens are told where they stand, one at a position: those
        of the newest queries stand before `asked`, int32 (B,)."""
        affine, places = self.beside.affine, self._places(asked)
        state = replace(self.cache.state(), places=places)
        if self.kernels.packing is not self.kernels.reading:
            state = replace(state, key_rows=self._as_read(state.key_rows), value_rows=self._as_read(state.value_rows))
        return Read(self.kernels.reading, state, self.params, affine.get("keys"), affine.get("values"))

    def _as_read(self, rows: Tensor) -> Tensor:
        """Exact rows in the dtype of the reading kernels.  Where all tokens are packed they hold none, and nothing is
        cast in a step."""
        dtype = DTYPES[self.kernels.reading.shape.dtype]
        if self.kernels.reading.scheme.recent is not None:
            return rows.to(dtype)
        if self._no_rows.shape != rows.shape:  # at first, and in a batch of another size
            self._no_rows = torch.zeros_like(rows, dtype=dtype)
        return self._no_rows

    def _places(self, asked: Tensor | None = None) -> Places | None:
        """Where its tokens stand, for kernels that ask."""
        if not self.kernels.reading.shape.placed:
            return None
        return Places(self.beside.positions, self.beside.end, self.sinks, asked)

    def _single_places(self, positions: Tensor) -> Places | None:
        """The same for pages of one head each, of which one token counts, int (B, H, ...)."""
        if not self.kernels.reading.shape.placed:
            return None
        at = positions.flatten().to(torch.int32)[:, None, None].repeat(1, 1, self._single().page_tokens)
        return Places(at, self.beside.end, self.sinks)

    def numbers(self, side: Side) -> Tensor:
        """All tokens decoded, token j in place j: (B, H, most, D), float32."""
        found, most = self.cache.dense(side, self._places()), max(self.counts, default=0)
        shift = most - column(self.counts, found.device)
        at = (torch.arange(most, device=found.device) + shift).clamp(max=max(0, most - 1))
        found = found.gather(2, at[:, None, :, None].expand_as(found)).float()
        affine = self.beside.affine.get(side)
        return found if affine is None else affine.given_back(found)

    def fetch(self, side: Side, slots: Tensor) -> Tensor:
        """Single tokens decoded, by their places int64 (B, H, K): float32 (B, H, K, D).  A page is decoded for each."""
        single, (pool, table), slots_flat = self._single(), self._pages(slots), slots.flatten()
        places = self._single_places(self.beside.positions.gather(2, slots))
        numbers = single.unpack(side, pool, table, 0, single.page_tokens, self.params, places)[:, 0]
        at = (slots_flat % single.page_tokens)[:, None, None].expand(-1, 1, numbers.shape[2])
        found, affine = numbers.gather(1, at).view(*slots.shape, -1), self.beside.affine.get(side)
        return found if affine is None else affine.given_back(found)

    def _single(self) -> KernelSet:
        assert self.kernels.single is not None
        return self.kernels.single

    def _pages(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """The pool as pages of one head each, and the page of each place (B, H, K): int32 (B H K, 2), the second of
        nothing."""
        table, pool = self.cache.pages()
        heads, single = slots.shape[1], self._single()
        at = (slots // single.page_tokens).flatten(1)
        page = table.long().gather(1, at.clamp(max=table.shape[1] - 1)).view_as(slots)
        page = page * heads + torch.arange(heads, device=slots.device)[:, None]
        both = torch.stack([page.flatten(), torch.zeros_like(page.flatten())], 1)
        return pool.view(-1, single.page_bytes), both.to(torch.int32)

    def mark(self) -> tuple[Any, Beside]:
        """What `back` brings the tier back to."""
        return self.cache.mark(), self.beside

    def back(self, mark: tuple[Any, Beside]) -> None:
        """The tokens as at a mark; those that were written over in their places are not."""
        self.cache.back(mark[0])
        self.within(max(mark[1].end, self.beside.end), mark[1])  # places behind the tokens may say so

    def within(self, end: int, beside: Beside | None = None) -> None:
        """From now on, or with another `beside`, no position is known to be as large as `end`."""
        beside = self.beside if beside is None else beside
        self.beside = replace(beside, end=max(beside.end, end))

    # -- moving -------------------------------------------------------------------------------------------------------

    def reorder(self, index: Sequence[int]) -> None:
        """Chosen sequences, in that order."""
        at = column(index, self.beside.positions.device)[:, 0]
        beside = self.beside
        affine = {side: one.chosen(at) for side, one in beside.affine.items()}
        self.cache.reorder(list(index))
        positions = (
            beside.positions.index_select(0, at) if self.placed else beside.positions[:1].expand(len(index), -1, -1)
        )
        sums, weights = beside.sums.index_select(1, at), beside.weights.index_select(0, at)
        self.beside = replace(beside, affine=affine, positions=positions, sums=sums, weights=weights)
