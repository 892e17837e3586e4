"""How a cache's state follows from the one before: appending and cropping.

Nothing here changes what the old state says.  An append writes into memory that the old state does not read: fresh
pages, places behind the packed tokens of pages it alone holds, ring rows that hold no token.  So a step that fails is
undone by keeping the old state and counting the pool's pages again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .appending import from_own_pages
from .errors import CacheError
from .kernels import AttentionState, KernelSet, Params, Places, Room, Side
from .members import Cut
from .pages import PagePool, upload
from .rows import chunk_index, gather, ring_index, write
from .scheme import SIDES
from .state import Now, shifted


class Step(NamedTuple):
    """The next state, the pages to release once it is in force, and what this step's attention reads."""

    after: Now
    dropped: list[int]
    state: AttentionState


@dataclass(frozen=True)
class Machine:
    """What a step works with: kernels, parameters, pages."""

    kernels: KernelSet
    params: Params
    pool: PagePool

    def append(
        self, now: Now, fresh: dict[Side, Tensor], counts: Sequence[int], places: Places | None = None,
        due: Sequence[tuple[int, int]] | None = None,
    ) -> Step:  # fmt: skip
        """The last counts_b of the m tokens of fresh (B, H, m, D) join sequence b, and what is due is packed: due_b
        keys and values, if that is told."""
        policy, told = now.policy, [None] * len(counts) if due is None else due
        grown = list(zip(now.members, counts, told, strict=True))
        large = any(policy.is_large(member, count) for member, count, _ in set(grown))
        following = {one: policy.advance(one[0], one[1], large, one[2]) for one in set(grown)}
        members = tuple(following[one] for one in grown)
        moves = list(zip(now.members, members, strict=True))
        touched = {move: policy.touched(*move) for move in set(moves)}
        table, dropped = now.table, list[int]()
        if any(touched.values()) or any(m.gone for m in set(now.members)):
            gone = [m.gone // policy.page_tokens for m in now.members]
            table, dropped = table.claim(self.pool, [touched[move] for move in moves], gone)
        after = now.moved(members, table=table)
        if (left := self._at_once(now, after, fresh, counts)) is not None:
            rows, first = {side: now.rows(side) for side in SIDES}, now.zeros
        else:
            rows, firsts = self._written(now, fresh, counts, large)
            first, left = upload(firsts, now.length.device) if any(firsts) else now.zeros, SIDES
        for side in left:
            self._pack(side, rows[side], first, now, after, places)
        if large:
            source_ring = max(1, rows["keys"].shape[2] - policy.sinks)
            index = ring_index(policy.sinks, policy.ring, after.lengths, firsts, source_ring)
            after = replace(after, key_rows=gather(rows["keys"], index), value_rows=gather(rows["values"], index))
        if not policy.exact:
            return Step(after, dropped, after.seen(after, self.pool))
        return Step(after, dropped, after.seen(now, self.pool, first, **rows))

    def _at_once(
        self, now: Now, after: Now, fresh: dict[Side, Tensor], counts: Sequence[int]
    ) -> tuple[Side, ...] | None:
        """Of one token of every sequence: write its rows, and pack what the same launch can, where the kernels have
        one.  The sides that are left to be packed; None where nothing was done."""
        packs = self.kernels.packs_at_once
        if packs is None or set(counts) != {1} or fresh["keys"].shape[2] != 1:
            return None
        into = Room(
            self.pool.bytes, after.table.tensor, now.key_rows, now.value_rows, after.length,
            {side: _begin(side, now, after) for side in SIDES}, {side: after.packed(side) for side in SIDES},
            dict.fromkeys(SIDES, 0),
        )  # fmt: skip
        self.kernels.append(fresh["keys"], fresh["values"], into, self.params)
        return tuple(side for side in SIDES if side not in packs)

    def _written(
        self, now: Now, fresh: dict[Side, Tensor], counts: Sequence[int], large: bool
    ) -> tuple[dict[Side, Tensor], list[int]]:
        """The rows that hold the fresh tokens beside the old exact ones, and the u of each sequence's first ring
        row."""
        policy, chunk = now.policy, fresh["keys"].shape[2]
        if not large:
            for side in SIDES:
                write(now.rows(side), fresh[side], policy.sinks, now.lengths, counts)
            return {side: now.rows(side) for side in SIDES}, [0] * len(now.members)
        if not any(now.lengths) and set(counts) == {chunk}:
            return {side: fresh[side].contiguous() for side in SIDES}, [0] * len(now.members)
        firsts = [policy.tail(m, c) for m, c in zip(now.members, counts, strict=True)]
        index = chunk_index(policy.sinks, policy.ring, chunk, now.lengths, counts, firsts)
        return {side: gather(torch.cat([now.rows(side), fresh[side]], 2), index) for side in SIDES}, firsts

    def _pack(
        self, side: Side, rows: Tensor, first: Tensor, now: Now, after: Now, places: Places | None = None
    ) -> None:
        """Write the blocks of one side that are due into the pages of `after`."""
        moves = set(zip(now.members, after.members, strict=True))
        spans = {(now.policy.begins(*move)[SIDES.index(side)], move[1].packed_of(side)) for move in moves}
        due = [(begin, end) for begin, end in spans if begin < end]
        if due:
            begin = _begin(side, now, after)
            reach = (min(b for b, _ in due), max(e for _, e in due))
            end, table, size = after.packed(side), after.table.tensor, self.kernels.page_tokens
            pages = -(-(size - 1 + max(e - b for b, e in due)) // size)
            if reach[1] - reach[0] > pages * size and not self.kernels.by_position:
                first, begin, end, table = from_own_pages(table, size, pages, first, begin, end)
                reach = (0, pages * size)
            self.kernels.pack(
                side, rows, first, now.policy.sinks, begin, end, reach, self.pool.bytes, table, self.params, places
            )

    def crop(self, now: Now, lengths: Sequence[int], *, requantize: bool) -> tuple[Now, list[int], int]:
        """Sequence b at most lengths_b tokens long: (state, pages to release, codes that became exact rows)."""
        wanted = [(m, min(n, m.length)) for m, n in zip(now.members, lengths, strict=True)]
        cropped = {pair: now.policy.crop(*pair) for pair in set(wanted) if pair[1] < pair[0].length}
        cuts = [cropped[pair][1:] if pair in cropped else None for pair in wanted]
        second = sum(cut.decode[1] - cut.decode[0] for both in cuts if both for cut in both)
        if second and not requantize:
            raise CacheError(
                f"crop: {min(lengths)} tokens divide blocks whose exact rows are gone; {second} keys and values would "
                f"be quantized twice; crop to a whole block, record(draft=) before appending, or let requantize=True"
            )
        members = tuple(cropped[pair][0] if pair in cropped else pair[0] for pair in wanted)
        size = now.policy.page_tokens
        table, dropped = now.table.truncate([-(-m.packed // size) for m in members])
        rows = [self._decoded(now, side, [both and both[number] for both in cuts]) for number, side in enumerate(SIDES)]
        return now.moved(members, table=table, key_rows=rows[0], value_rows=rows[1]), dropped, second

    def _decoded(self, now: Now, side: Side, cuts: Sequence[Cut | None]) -> Tensor:
        """The row buffer of a side with the tokens of cut blocks decoded into it; a copy when there are any."""
        rows, policy = now.rows(side), now.policy
        block = policy.window_of(side).block
        spans = [(b, *cut.decode) for b, cut in enumerate(cuts) if cut and cut.decode[0] < cut.decode[1]]
        if spans:
            rows = rows.clone()
        for b, begin, end in spans:
            table = now.table.tensor[b : b + 1]
            numbers = self.kernels.unpack(side, self.pool.bytes, table, begin, begin + block, self.params)
            tokens = numbers[:, :, : end - begin].to(rows.dtype)
            write(rows[b : b + 1], tokens, policy.sinks, [begin + policy.sinks], [end - begin])
        return rows


def _begin(side: Side, now: Now, after: Now) -> Tensor:
    """int32 (B,): the u from which on a side is packed between two states."""
    moves, which = list(zip(now.members, after.members, strict=True)), SIDES.index(side)
    return shifted(now.packed(side), moves, lambda a, b: (a.packed_of(side), now.policy.begins(a, b)[which]))
