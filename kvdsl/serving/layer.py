"""One layer of a served model: tokens go into the engine's pages, and attention reads these."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvdsl.inputs import DTYPES
from kvdsl.kernels import AttentionState, Form, KernelSet, Params, Side
from kvdsl.scheme import SIDES

from .served import Served
from .step import Group, Step


@dataclass
class ServedLayer:
    """Kernels and exact rows of one layer.

    kernels, params   of `how.scheme`, for the layer's heads (of this rank)
    count     slots; `ring` rows of each beside the sinks
    """

    how: Served
    kernels: KernelSet
    params: Params
    scaling: float
    count: int
    ring: int
    device: torch.device
    softcap: float | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        shape = self.kernels.shape
        sizes = (self.count, shape.kv_heads, self.how.sinks + self.ring if self.how.waits else 1, shape.head_dim)
        self.rows: dict[Side, Tensor] = {
            side: torch.zeros(sizes, dtype=DTYPES[shape.dtype], device=self.device) for side in SIDES
        }

    @property
    def nbytes(self) -> int:
        """Bytes of exact rows, beside the engine's pages."""
        return sum(rows.nbytes for rows in self.rows.values())

    def forward(self, query: Tensor, keys: Tensor, values: Tensor, pool: Tensor, step: Step, out: Tensor) -> None:
        """Store the step's keys and values (N, H, D) in pages of `pool`, uint8 (pages, page_bytes), and write attention
        of query (N, Hq, D) to `out` like it."""
        fresh: dict[Side, Tensor] = {"keys": keys, "values": values}
        # What pieces of longer chunks read of slots is read before the chunk's own tokens take its place.
        waiting = [self._rows(group, fresh) for group in step.groups if group.held is not None]
        if step.kept is not None:
            slot, row, token = step.kept
            for side in SIDES:
                self.rows[side][slot, :, row] = fresh[side][token].to(self.rows[side].dtype)
        for group in step.groups:
            if not self.how.waits:
                self._pack(group, {side: x[group.rows].transpose(1, 2).contiguous() for side, x in fresh.items()}, pool)
                rows = {side: held[: group.length.shape[0]] for side, held in self.rows.items()}  # of no tokens
            else:
                rows = waiting.pop(0) if group.held is not None else self._slots(group)
                self._pack(group, rows, pool)
            self._attend(group, rows, query, pool, out)

    def _pack(self, group: Group, rows: dict[Side, Tensor], pool: Tensor) -> None:
        """Pack what is due."""
        if not len(group.end):
            return
        for side in SIDES:
            due = rows[side] if group.due is None else rows[side].index_select(0, group.due)
            self.kernels.pack(
                side, due, group.first, self.how.sinks, group.begin, group.end, group.reach, pool, group.into,
                self.params,
            )  # fmt: skip

    def _attend(self, group: Group, rows: dict[Side, Tensor], query: Tensor, pool: Tensor, out: Tensor) -> None:
        state = AttentionState(
            pool, group.table, group.packed, group.packed, group.length, rows["keys"], rows["values"], group.zeros,
            group.zeros, group.longest, group.most, self.scaling, self.softcap, self.window,
        )  # fmt: skip
        count = group.length.shape[0]
        asked = query[:count, :, None] if group.alone else query[group.rows].transpose(1, 2).contiguous()
        found, _ = self.kernels.attend(asked, state, self.params, form=self._form(group))
        if group.alone:
            out[:count] = found[:, :, 0]
        else:
            out.index_copy_(0, group.outputs, found.transpose(1, 2).flatten(0, 1)[group.inverse].to(out.dtype))

    def _form(self, group: Group) -> Form | None:
        """How pages are read.  Pieces of one request share pages: decoded apart, these would stand there many times."""
        if self.kernels.backend == "torch":
            return None
        found = self.kernels.form(group.queries, group.most, group.longest - group.most, self.window)
        return "extend" if found == "dense" else found

    def _slots(self, group: Group) -> dict[Side, Tensor]:
        """The slots of requests that have one token, which stands there."""
        slots = group.slots
        if isinstance(slots, slice):
            return {side: rows[slots] for side, rows in self.rows.items()}
        assert slots is not None
        return {side: rows.index_select(0, slots) for side, rows in self.rows.items()}

    def _rows(self, group: Group, fresh: dict[Side, Tensor]) -> dict[Side, Tensor]:
        """Exact rows of the blocks of all pieces, of slots as they are before the step, and of the step's tokens."""
        assert isinstance(group.slots, Tensor) and group.held is not None
        assert group.fresh is not None and group.new is not None
        found: dict[Side, Tensor] = {}
        for side, kept in self.rows.items():
            held = kept.index_select(0, group.slots).transpose(1, 2)
            held = held.gather(1, group.held[..., None, None].expand(-1, -1, *held.shape[2:]))
            rows = torch.where(group.new[..., None, None], fresh[side][group.fresh].to(kept.dtype), held)
            found[side] = rows.transpose(1, 2).contiguous()
        return found
