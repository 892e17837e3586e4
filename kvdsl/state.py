"""What a cache holds at one moment, as one value: a change of the cache is one assignment of a new one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .inputs import DTYPES
from .kernels import AttentionState, KernelSet, Side
from .members import Member, Policy
from .pages import PagePool, PageTable, upload
from .scheme import SIDES

Moves = Sequence[tuple[Member, Member]]


@dataclass(frozen=True)
class Now:
    """The policy, the host numbers of each sequence, the page table, and on the device the lengths (B,) int32 (and
    `zeros`, the first u of a ring) and the row buffers of exact tokens (B, H, sinks + ring, D)."""

    policy: Policy
    members: tuple[Member, ...]
    table: PageTable
    length: Tensor
    packed_keys: Tensor
    packed_values: Tensor
    start: Tensor
    zeros: Tensor
    key_rows: Tensor
    value_rows: Tensor

    @classmethod
    def empty(cls, policy: Policy, batch: int, kernels: KernelSet, device: torch.device) -> Now:
        """`batch` sequences of no tokens."""
        sizes = (batch, kernels.shape.kv_heads, policy.sinks + policy.ring)
        dtype = DTYPES[kernels.shape.dtype]
        rows = [torch.zeros(*sizes, kernels.dim(side), dtype=dtype, device=device) for side in SIDES]
        numbers = [torch.zeros(batch, dtype=torch.int32, device=device) for _ in range(5)]
        return cls(policy, (Member(),) * batch, PageTable.of(((),) * batch, device), *numbers, *rows)

    @classmethod
    def joined(cls, parts: Sequence[Now]) -> Now:
        """The sequences of several states of one policy, side by side: rows are copied, pages are not."""
        names = ("length", "packed_keys", "packed_values", "start", "zeros", "key_rows", "value_rows")
        tensors = [torch.cat([getattr(part, name) for part in parts]) for name in names]
        table = PageTable.of([ids for part in parts for ids in part.table.ids], tensors[0].device)
        return cls(parts[0].policy, tuple(m for part in parts for m in part.members), table, *tensors)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence."""
        return tuple(m.length for m in self.members)

    def rows(self, side: Side) -> Tensor:
        """The row buffer of one side."""
        return self.key_rows if side == "keys" else self.value_rows

    def packed(self, side: Side) -> Tensor:
        """Packed counts of one side on the device."""
        return self.packed_keys if side == "keys" else self.packed_values

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors here: rows, table, lengths."""
        numbers = (self.length, self.packed_keys, self.packed_values, self.start, self.zeros)
        return sum(t.nbytes for t in (self.table.tensor, self.key_rows, self.value_rows, *numbers))

    def moved(self, members: tuple[Member, ...], **changes: Any) -> Now:
        """The same with other members, and the device tensors that follow from them."""

        moves = list(zip(self.members, members, strict=True))
        each = set(moves)

        def move(tensor: Tensor, number: Callable[[Member], int]) -> Tensor:
            return shifted(tensor, moves, lambda old, new: (number(old), number(new)), each)

        return replace(
            self,
            members=members,
            length=move(self.length, lambda m: m.length),
            packed_keys=move(self.packed_keys, lambda m: m.keys),
            packed_values=move(self.packed_values, lambda m: m.values),
            start=move(self.start, lambda m: m.start),
            **changes,
        )

    def chosen(self, index: Sequence[int]) -> Now:
        """Chosen sequences in that order: tables and rows are copied, pages are not."""
        places = upload(index, self.length.device, torch.int64)
        tensors = {
            name: getattr(self, name).index_select(0, places)
            for name in ("length", "packed_keys", "packed_values", "start", "zeros", "key_rows", "value_rows")
        }
        return replace(self, members=tuple(self.members[i] for i in index), table=self.table.select(index), **tensors)

    def seen(self, packed: Now, pool: PagePool, first: Tensor | None = None, **rows: Tensor) -> AttentionState:
        """What attention reads of this state when it takes for packed what another (an earlier one) has packed."""
        return AttentionState(
            pool=pool.bytes,
            table=self.table.tensor,
            packed_keys=packed.packed_keys,
            packed_values=packed.packed_values,
            length=self.length,
            key_rows=rows.get("keys", self.key_rows),
            value_rows=rows.get("values", self.value_rows),
            first=self.zeros if first is None else first,
            start=self.start,
            longest=max(self.lengths, default=0),
            packed_most=max((m.packed for m in packed.members), default=0),
            scaling=self.key_rows.shape[3] ** -0.5,
            window=self.policy.sliding,
        )


def shifted(
    tensor: Tensor,
    moves: Moves,
    numbers: Callable[[Member, Member], tuple[int, int]],
    each: set[tuple[Member, Member]] | None = None,
) -> Tensor:
    """The device tensor of the second number of each move, given that of the first: by arithmetic where all sequences
    move alike, so that nothing has to be sent to the device.  `each`: the moves that there are, if they are known."""
    steps = {b - a for a, b in (numbers(*move) for move in (set(moves) if each is None else each))}
    if steps <= {0}:
        return tensor
    return tensor + steps.pop() if len(steps) == 1 else upload([numbers(*move)[1] for move in moves], tensor.device)
