"""The exact tokens of a cache with tiers: sinks, and those that wait to be sent to a tier, first come first gone.

A buffer of rows is (B, H, sinks + ring, D): token t < sinks is row t, token u = t - sinks is row
sinks + (u - base_b) % ring.  A chunk that the ring has no room for gets a buffer of its own, until tokens have left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .inputs import DTYPES
from .kernels import AttentionState, Places, Side
from .pages import upload
from .rows import chunk_index, gather, write
from .scheme import SIDES, Scheme
from .shape import Shape

CHUNK = 16
"""Fresh tokens that the ring has room for beside those that wait."""


@dataclass(frozen=True)
class Front:
    """What waits at one moment; a change gives a new value and writes only into rows that hold no token.

    lengths   tokens of each sequence so far
    gone      of those behind the sinks, how many have left
    base      the u that stands in the first row of the ring
    owned     whether the buffers are the front's own, and not a caller's tensors
    sums      (sums, B, H, sinks + ring) float32: what is carried on for the token of each row
    """

    sinks: int
    room: int
    lengths: tuple[int, ...]
    gone: tuple[int, ...]
    base: tuple[int, ...]
    owned: bool
    keys: Tensor
    values: Tensor
    sums: Tensor

    @classmethod
    def empty(cls, scheme: Scheme, sums: int, batch: int, shape: Shape, device: torch.device) -> Front:
        """No tokens yet, and room for those of the window and those that are decided on together."""
        sinks = scheme.sinks.tokens if scheme.sinks else 0
        every = 1 if scheme.router is None else scheme.router.every
        room = (scheme.recent.tokens if scheme.recent else 0) + (every if isinstance(every, int) else 1)
        sizes = (batch, shape.kv_heads, sinks + CHUNK)  # it grows as tokens wait
        keys, values = (torch.zeros(*sizes, shape.head_dim, dtype=DTYPES[shape.dtype], device=device) for _ in SIDES)
        none = (0,) * batch
        return cls(sinks, room, none, none, none, True, keys, values, torch.zeros(sums, *sizes, device=device))

    @property
    def ring(self) -> int:
        """Rows behind those of sinks."""
        return self.keys.shape[2] - self.sinks

    @property
    def waiting(self) -> tuple[int, ...]:
        """Exact tokens of each sequence behind its sinks."""
        return tuple(max(0, n - self.sinks) - gone for n, gone in zip(self.lengths, self.gone, strict=True))

    @property
    def held(self) -> tuple[int, ...]:
        """Exact tokens of each sequence."""
        return tuple(min(self.sinks, n) + w for n, w in zip(self.lengths, self.waiting, strict=True))

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(x.nbytes for x in (self.keys, self.values, self.sums))

    def rows(self, side: Side) -> Tensor:
        """The row buffer of one side."""
        return self.keys if side == "keys" else self.values

    def append(self, fresh: dict[Side, Tensor], counts: Sequence[int]) -> Front:
        """The last counts_b of the m tokens of fresh (B, H, m, D) join sequence b."""
        lengths = tuple(n + c for n, c in zip(self.lengths, counts, strict=True))
        after = replace(self, lengths=lengths)
        if max(after.waiting, default=0) > self.ring or not self.owned:
            return self._joined(fresh, counts, lengths)
        begins = [n if n < self.sinks else n - base for n, base in zip(self.lengths, self.base, strict=True)]
        for side in SIDES:
            write(self.rows(side), fresh[side], self.sinks, begins, counts)
        if len(self.sums):
            self._clear()
        return after

    def _joined(self, fresh: dict[Side, Tensor], counts: Sequence[int], lengths: tuple[int, ...]) -> Front:
        """The same in buffers of their own: [sinks | waiting | chunk], the ring's first row the first that waits."""
        chunk = fresh["keys"].shape[2]
        if not any(self.lengths) and set(counts) == {chunk} and chunk > self.sinks:
            rows = {side: fresh[side].contiguous() for side in SIDES}
            sums = self.sums.new_zeros(*self.sums.shape[:3], chunk)
            return replace(self, lengths=lengths, owned=False, keys=rows["keys"], values=rows["values"], sums=sums)
        begins = [n if n < self.sinks else n - base for n, base in zip(self.lengths, self.base, strict=True)]
        firsts = [gone - base for gone, base in zip(self.gone, self.base, strict=True)]
        index = chunk_index(self.sinks, self.ring, chunk, begins, counts, firsts)
        rows = {side: gather(torch.cat([self.rows(side), fresh[side]], 2), index) for side in SIDES}
        zeros = self.sums.new_zeros(*self.sums.shape[:3], chunk)
        sums = torch.cat([self.sums, zeros], 3)
        places = index.to(sums.device)[None, :, None].expand(*sums.shape[:3], -1)
        return replace(
            self, lengths=lengths, base=self.gone, owned=True, keys=rows["keys"], values=rows["values"],
            sums=sums.gather(3, places),
        )  # fmt: skip

    def without(self, counts: Sequence[int]) -> Front:
        """The first counts_b waiting tokens of each sequence have left; what stays stands in a ring of its own."""
        gone = tuple(g + c for g, c in zip(self.gone, counts, strict=True))
        after = replace(self, gone=gone)
        most = max(after.waiting, default=0)
        size = self.room + CHUNK
        if self.owned and most + CHUNK <= self.ring <= max(size, 4 * (most + CHUNK)):
            return after
        ring = min(size, 2 * most + CHUNK) if most + CHUNK <= size else 2 * most + CHUNK
        index = after.places(most)
        head = torch.arange(self.sinks, device=index.device).expand(len(gone), -1)
        index = torch.cat([head.clamp(max=self.keys.shape[2] - 1), index], 1)
        keys, values = (self._moved(self.rows(side), index, ring) for side in SIDES)
        sums = self._moved(self.sums[..., None], index.expand(len(self.sums), -1, -1), ring)[..., 0]
        return replace(after, base=gone, owned=True, keys=keys, values=values, sums=sums)

    def _moved(self, x: Tensor, index: Tensor, ring: int) -> Tensor:
        """Chosen rows of x (..., B, H, N, D), by index (..., B, L), in front of as many zeros as fill a ring."""
        out = x.new_zeros(*x.shape[:-2], self.sinks + ring, x.shape[-1])
        picked = x.gather(-2, index[..., None, :, None].expand(*x.shape[:-2], index.shape[-1], x.shape[-1]))
        out[..., : index.shape[-1], :] = picked
        return out

    def places(self, most: int) -> Tensor:
        """The rows of the first `most` waiting tokens, int64 (B, most) on the device."""
        first = [g - b for g, b in zip(self.gone, self.base, strict=True)]
        begin = upload(first, self.keys.device, torch.int64)[:, None]
        return self.sinks + torch.remainder(begin + torch.arange(most, device=self.keys.device), self.ring)

    def _clear(self) -> None:
        """Sums of rows that hold no token become 0."""
        device = self.sums.device
        begin = upload([g - b for g, b in zip(self.gone, self.base, strict=True)], device, torch.int64)[:, None]
        place = torch.remainder(torch.arange(self.ring, device=device) - begin, self.ring)
        live = place < upload(self.waiting, device, torch.int64)[:, None]
        self.sums[..., self.sinks :].mul_(live[:, None])

    def stands(self, asked: Tensor) -> Places:
        """Where the exact tokens stand in their sequences, those that have left counted, too."""
        heads, device = self.keys.shape[1], self.keys.device
        place = torch.arange(max(self.held, default=0), dtype=torch.int32, device=device)
        at = torch.where(place < self.sinks, place, place + upload(self.gone, device)[:, None])
        return Places(at[:, None].repeat(1, heads, 1), max(self.lengths, default=0), asked=asked)

    def state(self, pool: Tensor, zeros: Tensor) -> AttentionState:
        """What attention reads of the exact tokens, counted from the first that is still there."""
        first = [base - gone for base, gone in zip(self.base, self.gone, strict=True)]
        device = self.keys.device
        return AttentionState(
            pool=pool, table=zeros[:, None].contiguous(), packed_keys=zeros, packed_values=zeros,
            length=upload(self.held, device), key_rows=self.keys, value_rows=self.values,
            first=upload(first, device) if any(first) else zeros, start=zeros,
            longest=max(self.held, default=0), packed_most=0, scaling=self.keys.shape[3] ** -0.5,
        )  # fmt: skip

    def chosen(self, index: Sequence[int]) -> Front:
        """Chosen sequences, in that order, in buffers of their own."""
        at = upload(index, self.keys.device, torch.int64)
        lengths, gone, base = (tuple(x[i] for i in index) for x in (self.lengths, self.gone, self.base))
        keys, values = (self.rows(side).index_select(0, at) for side in SIDES)
        sums = self.sums.index_select(1, at)
        return replace(self, lengths=lengths, gone=gone, base=base, owned=True, keys=keys, values=values, sums=sums)

    def cropped(self, lengths: Sequence[int]) -> Front:
        """The sequences shortened: to no less than what has left."""
        return replace(self, lengths=tuple(lengths))
