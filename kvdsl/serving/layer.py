"""One layer of a served model: tokens go into the engine's pages, and attention reads these."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvdsl.appending import from_own_pages
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
        rows = self.how.sinks + self.ring if self.how.waits else 1
        sizes = (self.count if self.how.waits else 1, shape.kv_heads, rows, shape.head_dim)
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
        held = [self._stored(group, fresh, pool) for group in step.groups]
        for group, rows in zip(step.groups, held, strict=True):
            state = AttentionState(
                pool, group.table, group.packed, group.packed, group.length, rows["keys"], rows["values"],
                torch.zeros_like(group.length), torch.zeros_like(group.length), group.longest, group.most,
                self.scaling, self.softcap, self.window,
            )  # fmt: skip
            asked = query[group.rows].transpose(1, 2).contiguous()
            found, _ = self.kernels.attend(asked, state, self.params, form=self._form(group))
            out.index_copy_(0, group.outputs, found.transpose(1, 2).flatten(0, 1)[group.inverse].to(out.dtype))
        if step.kept is not None:
            slot, row, token = step.kept
            for side in SIDES:
                self.rows[side][slot, :, row] = fresh[side][token].to(self.rows[side].dtype)

    def _form(self, group: Group) -> Form | None:
        """How pages are read.  Pieces of one request share pages: decoded apart, these would stand there many times."""
        if self.kernels.backend == "torch":
            return None
        found = self.kernels.form(group.queries, group.most, group.longest - group.most, self.window)
        return "extend" if found == "dense" else found

    def _stored(self, group: Group, fresh: dict[Side, Tensor], pool: Tensor) -> dict[Side, Tensor]:
        """What is due is in pages; the exact rows that the group's pieces read."""
        return self._blocks(group, fresh, pool) if self.how.waits else self._tokens(group, fresh, pool)

    def _tokens(self, group: Group, fresh: dict[Side, Tensor], pool: Tensor) -> dict[Side, Tensor]:
        """Every token is packed as it comes."""
        size = self.kernels.page_tokens
        pages = -(-(size - 1 + group.queries) // size)
        first = group.length - group.queries
        first, begin, end, table = from_own_pages(group.table, size, pages, first, group.begin, group.length)
        for side in SIDES:
            rows = fresh[side][group.rows].transpose(1, 2).contiguous()
            self.kernels.pack(side, rows, first, 0, begin, end, (0, pages * size), pool, table, self.params)
        count = group.length.shape[0]
        return {side: self.rows[side].expand(count, -1, -1, -1).contiguous() for side in SIDES}

    def _blocks(self, group: Group, fresh: dict[Side, Tensor], pool: Tensor) -> dict[Side, Tensor]:
        """Blocks that are full are packed."""
        assert group.held is not None and group.fresh is not None and group.new is not None
        assert group.slots is not None and group.full is not None and group.full_table is not None
        found: dict[Side, Tensor] = {}
        for side in SIDES:
            kept, new = self.rows[side], fresh[side]
            held = kept[group.slots[:, None], :, group.held]  # (n, rows, H, D)
            rows = torch.where(group.new[..., None, None], new[group.fresh].to(kept.dtype), held)
            found[side] = rows.transpose(1, 2).contiguous()
            if len(group.full):
                full = found[side][group.full]
                begin = torch.zeros(len(full), dtype=torch.int32, device=full.device)
                end, reach = torch.full_like(begin, self.how.block), (0, self.how.block)
                self.kernels.pack(
                    side, full, begin, self.how.sinks, begin, end, reach, pool, group.full_table, self.params
                )
        return found
