"""Segments of a cache as the programs that attend to them, and the places of their partial outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvdsl.kernels import AttentionState, Fold, Form, Params

from .plan import Plan

if TYPE_CHECKING:
    from .run_triton import TritonModule

LOG2E = 1.4426950408889634
NO_WINDOW = 1 << 30
Scratch = dict[str, Tensor]
"""Partials by argument, float32: of n splits `partial_ptr` (n * programs * blocks * rows, numbers), and `lse_ptr` with
one a row; where exact rows add to the output itself, `exact_ptr` and `share_ptr` of the programs that read them."""


@dataclass(frozen=True, eq=False)
class Part:
    """One segment: of every sequence `clean` programs share the pages that all queries see, `edges` what is left; of a
    dense one `clean` share all of it.  `depth` of the pipeline, and warps, `times` the usual ones: where timing found
    them.  `fixed`: sums must not depend on who else is in the batch."""

    module: TritonModule
    query: Tensor
    state: AttentionState
    params: Params
    clean: int = 1
    edges: int = 1
    fold: Fold | None = None
    form: Form = "decode"
    depth: int | None = None
    times: int | None = None
    fixed: bool = False

    @property
    def plan(self) -> Plan:
        return self.module.plan

    @property
    def count(self) -> int:
        """Partials of a row."""
        return self.clean + self.edges

    @cached_property
    def rows(self) -> int:
        """Query rows of a program, and of a block of partials."""
        return self.plan.rows(many=self.form != "decode")

    @cached_property
    def blocks(self) -> int:
        """Programs that share the query rows of a kv head."""
        return -(-self.query.shape[2] * self.plan.shape.group // self.rows)

    @cached_property
    def programs(self) -> int:
        """Sequences times kv heads."""
        return self.query.shape[0] * self.plan.shape.kv_heads

    @property
    def plain(self) -> bool:
        """Whether partials are of the head's own numbers, so that they may be merged with those of other segments."""
        return self.form == "dense" or not self.plan.values.through

    def most(self, splits: int) -> int:
        """So many programs, but no more than a sequence has pages."""
        return max(1, min(splits, -(-self.state.longest // self.plan.layout.page_tokens)))

    def places(self, count: int) -> int:
        """Of `count` partials of every row."""
        return count * self.programs * self.blocks * self.rows

    def shared(self, count: int) -> Scratch:
        """Room for `count` partials of the head's own numbers."""
        return self._scratch(count, self.plan.values.channels)

    def own(self) -> Scratch:
        """Room for this segment's partials."""
        values, edges = self.plan.values, self.places(self.edges)
        found = self._scratch(self.count, values.row)
        if values.apart:  # sums over exact rows, which the map of the values does not touch
            found["exact_ptr"] = self.floats(edges * self.plan.values.channels)
            found["share_ptr"] = self.floats(edges)
        return found

    def unfold(self, into: Scratch, count: int, rows: int, blocks: int) -> None:
        """Put back into the first `count` partials what was taken out of the segment's numbers."""
        if self.fold is None:
            return
        dim, lines = self.plan.values.channels, blocks * rows
        partials = into["partial_ptr"][: count * self.programs * lines * dim].view(count, self.programs, lines, dim)
        partials = partials[:, :, : self.query.shape[2] * self.plan.shape.group]  # others may never have been written
        if self.fold.factor is not None:
            partials.mul_(self.fold.factor.reshape(1, self.programs, 1, dim))
        if self.fold.shift is not None:
            partials.add_(self.fold.shift.reshape(1, self.programs, 1, dim))
        if self.fold.bias is not None:
            batch, _, queries = self.fold.bias.shape
            bias = self.fold.bias.view(batch, self.plan.shape.kv_heads, -1, queries).mT.flatten(2) * LOG2E
            lse = into["lse_ptr"][: count * self.programs * lines].view(count, self.programs, lines)
            lse[..., : bias.shape[2]] += bias.view(1, self.programs, -1)

    def behind(self, scratch: Scratch, count: int) -> Scratch:
        """What stands behind the first `count` partials of a shared buffer."""
        places = self.places(count)
        starts = {"partial_ptr": places * self.plan.values.channels, "lse_ptr": places}
        return {name: scratch[name][start:] for name, start in starts.items()}

    def floats(self, *size: int) -> Tensor:
        return torch.empty(*size, dtype=torch.float32, device=self.query.device)

    def _scratch(self, count: int, numbers: int) -> Scratch:
        places = self.places(count)
        return {"partial_ptr": self.floats(places * numbers), "lse_ptr": self.floats(places)}


def within(counts: Sequence[int], most: int) -> list[int]:
    """Counts, in proportion to those given where these are more than `most` together; each that is not 0 one at
    least."""
    total = sum(counts)
    return list(counts) if total <= most else [max(min(1, count), count * most // total) for count in counts]
