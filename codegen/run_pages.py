"""Packing into pages and unpacking, with generated Triton kernels: what terms are given, scratch, rotary positions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from kvdsl.kernels import Params, Side
from kvdsl.params import ROPE
from kvdsl.rope import NEAR, in_order, near, table

from .host import cartesian, polar, saturated
from .host_beside import Taken, kept_there, level_counts, placed, together
from .host_channels import among, choose
from .host_channels import given as beside
from .host_slots import Split, kept, split
from .plan import SidePlan
from .run_kernels import KernelModule
from .text import padded
from .triton_beside_pages import PUT_TOKENS
from .triton_rope import ROTATE_ROWS
from .triton_turn import TURN_LANES, turn_rows

SCRATCH = 1 << 26  # bytes of mapped rows that wait to be packed or mapped back at a time
WAVES = WeakTensorKeyDictionary()
"""Orders of the channels of all heads -> the waves of the first positions, and the same in those orders."""


class PageModule(KernelModule):
    """The kernels of one generated module that write pages and read them back."""

    def pack(self, side: Side, rows: Tensor, first: Tensor, offset: int, begin: Tensor, end: Tensor,
             reach: tuple[int, int], pool: Tensor, table: Tensor, params: Params) -> None:  # fmt: skip
        part, rows = self.plan.side(side), rows.contiguous()
        if not part.turned and part.residual is None:
            self._pack(part, rows, first, offset, begin, end, reach, pool, table, params)
            return
        for low, high in self._chunks(part, *reach, rows.shape[0]):
            at, source, start, taken, chosen, above = first, rows, offset, None, None, None
            if part.sparse or part.parted:
                source, at, start = _taken(rows, first, offset, low, high), torch.full_like(first, low), 0
            if part.sparse:
                taken = split(source, part.sparse, side)
            if part.parted:
                channels = choose(source, part.parted.choice)
                chosen = Taken(channels, among(channels, part.choice.tokens, source.shape[3]))
                put = channels.to(torch.uint8), begin, end, low, pool, table
                self._put(f"put_{part.space}_channels", *put)
            for term in part.spaces:
                if taken is not None and term.slots:
                    self._pack_slots(term, source, taken, begin, end, (low, high), pool, table)
                elif chosen is not None and term.beside:
                    kept_rows = _beside_rows(term, source if above is None else above, chosen.channels)
                    self._put(f"put_{term.space}", kept_rows, begin, end, low, pool, table)
                else:
                    given, raised = taken.filled if taken is not None and term is part else source, {}
                    if chosen is not None and term.parted:
                        given = beside(term.parted, source, chosen.theirs)
                    if chosen is not None and term.raised:
                        above = torch.empty(given.shape, dtype=torch.uint8, device=given.device)
                        raised = {"counts_ptr": level_counts(term, chosen.theirs), "above_ptr": above}
                    self._pack_term(term, given, at, start, begin, end, (low, high), pool, table, params, raised)
                if term.residual is not None:
                    # what is left of the chunk's tokens, in rows of their own
                    source = saturated(_taken(source, at, start, low, high)) - self._decoded(
                        term, pool, table, low, high, params
                    )
                    at, start = torch.full_like(first, low), 0

    def _put(
        self, kernel: str, rows: Tensor, begin: Tensor, end: Tensor, low: int, pool: Tensor, table: Tensor
    ) -> None:
        """Write bytes (B, H, blocks, size) of tokens from u = low on."""
        batch, heads, blocks, _ = rows.shape
        given = {
            "bytes_ptr": rows.contiguous(), "begin_ptr": begin, "end_ptr": end, "table_ptr": table,
            "table_width": table.shape[1], "low": low, "blocks": blocks,
        }  # fmt: skip
        self._run(kernel, (blocks, batch * heads), given, pool, {})

    def _chosen(self, term: SidePlan, pool: Tensor, table: Tensor, low: int, high: int) -> Tensor:
        """Which channels are chosen for each of the tokens u in [low, high): uint8 (B, H, high - low, count)."""
        layout, held = self.plan.layout, term.choice
        first, last = low // layout.page_tokens, -(-high // layout.page_tokens)
        blobs = pool[:, : layout.head_bytes * layout.kv_heads].unflatten(1, (layout.kv_heads, layout.head_bytes))
        section = blobs[:, :, held.offset : held.offset + held.blocks * held.count]
        channels = section[table[:, first:last].long()].unflatten(-1, (held.blocks, held.count))
        of_tokens = channels.movedim(2, 1).flatten(2, 3).repeat_interleave(held.tokens, 2)
        return of_tokens[:, :, low - first * layout.page_tokens :][:, :, : high - low]

    def _pack_slots(self, term: SidePlan, rows: Tensor, taken: Split, begin: Tensor, end: Tensor,
                    reach: tuple[int, int], pool: Tensor, table: Tensor) -> None:  # fmt: skip
        """Write what stands in slots of a chunk's tokens u in `reach`, given in rows."""
        batch, heads = rows.shape[:2]
        blocks = taken.places.shape[2]
        given = {
            "numbers_ptr": kept(rows, taken, term.name).contiguous(),
            "places_ptr": taken.places.to(torch.uint8).contiguous(), "begin_ptr": begin, "end_ptr": end,
            "table_ptr": table, "table_width": table.shape[1], "low": reach[0], "blocks": blocks,
        }  # fmt: skip
        self._run(f"pack_{term.label}", (blocks, batch * heads), given, pool, {})

    def _pack_term(self, term: SidePlan, rows: Tensor, first: Tensor, offset: int, begin: Tensor, end: Tensor,
                   reach: tuple[int, int], pool: Tensor, table: Tensor, params: Params,
                   raised: Mapping[str, Tensor]) -> None:  # fmt: skip
        """Write one term, or all bands, of a chunk's tokens u in `reach`; `raised`: of channels with more bits."""
        if not term.turned:
            self._pack(term, rows, first, offset, begin, end, reach, pool, table, params, raised)
            return
        (low, high), (batch, heads, total, _) = reach, rows.shape
        coded = torch.empty(batch, heads, high - low, term.stride, dtype=torch.float32, device=rows.device)
        given = {
            "rows_ptr": rows, "source_ptr": rows, "first_ptr": first, "begin_ptr": begin, "end_ptr": end,
            "out_ptr": coded, "total_rows": total, "offset": offset, "ring": total - offset, "low": low,
            "count": high - low,
        }  # fmt: skip
        beside = {}
        if term.sketched:
            beside["squares_ptr"] = torch.empty(coded.shape[:3], dtype=torch.float64, device=rows.device)
        at = torch.full_like(first, low)
        if term.rope is not None:
            given |= self._positions(high, rows.device, params)
            self._run("unrope_keys", (-(-(high - low) // ROTATE_ROWS), batch * heads), given, None, params)
            if term.mapped:
                before, coded = coded, torch.empty_like(coded)
                given |= {"coded_ptr": before, "out_ptr": coded, "first_ptr": at, "total_rows": high - low}
                given |= {"offset": 0, "ring": high - low}
        if term.mapped:
            grid = self._turn_grid(term, high - low, batch, term.stride)
            self._run(f"turn_{term.space}", grid, given | beside, None, params)
        elif term.rope is None:
            coded = _taken(rows, first, offset, low, high)
        coded = polar(coded, term.store.levels) if term.polar else coded
        for band in term.parts:
            self._pack(band, coded, at, 0, begin, end, reach, pool, table, params, beside)

    def _chunks(self, part: SidePlan, low: int, high: int, batch: int) -> list[tuple[int, int]]:
        """Spans of tokens whose mapped rows fit SCRATCH, cut at whole programs of `pack`."""
        span = math.lcm(*(term.span for term in part.terms), part.choice.tokens if part.parted else 1)
        bytes_a_token = 4 * batch * self.plan.shape.kv_heads * max(term.stride for term in part.terms)
        size = max(1, SCRATCH // bytes_a_token // span) * span
        cuts = [low, *range(low // size * size + size, high, size), high]
        return list(zip(cuts, cuts[1:], strict=False)) if low < high else []

    def _turn_grid(self, term: SidePlan, count: int, batch: int, numbers: int) -> tuple[int, int, int]:
        lanes = numbers if term.hadamard else min(TURN_LANES, padded(numbers))
        return -(-count // turn_rows(term)), batch * self.plan.shape.kv_heads, -(-numbers // lanes)

    def _pack(self, term: SidePlan, rows: Tensor, first: Tensor, offset: int, begin: Tensor, end: Tensor,
              reach: tuple[int, int], pool: Tensor, table: Tensor, params: Params,
              beside: Mapping[str, Tensor] | None = None) -> None:  # fmt: skip
        span = term.span
        batch, heads = rows.shape[:2]
        low, high = reach[0] // span, -(-reach[1] // span)
        given = {
            "rows_ptr": rows, "coded_ptr": rows, "first_ptr": first, "begin_ptr": begin, "end_ptr": end,
            "table_ptr": table, "total_rows": rows.shape[2], "offset": offset, "ring": rows.shape[2] - offset,
            "table_width": table.shape[1], "first_step": low, **(beside or {}),
        }  # fmt: skip
        self._run(f"pack_{term.label}", (max(0, high - low), batch * heads), given, pool, params)

    def unpack(self, side: Side, pool: Tensor, table: Tensor, begin: int, end: int, params: Params) -> Tensor:
        part = self.plan.side(side)
        if not part.turned and part.residual is None or begin >= end:
            return self._unpack(part, pool, table, begin, end, self.plan.shape.head_dim, params)
        found = []
        for low, high in self._chunks(part, begin, end, table.shape[0]):
            *others, last = (self._decoded(term, pool, table, low, high, params) for term in part.spaces)
            found.append(sum(reversed(others), last))  # each store's number plus that of all that it left
        return found[0] if len(found) == 1 else torch.cat(found, 2)

    def _decoded(self, term: SidePlan, pool: Tensor, table: Tensor, low: int, high: int, params: Params) -> Tensor:
        """One term, or all bands, of tokens u in [low, high), float32 (B, H, high - low, D)."""
        batch, dim = table.shape[0], self.plan.shape.head_dim
        coded = self._unpack(term, pool, table, low, high, term.stride, params)
        if term.beside:
            return placed(coded, self._chosen(term, pool, table, low, high), 1, dim)
        coded = cartesian(coded, term.store.levels) if term.polar else coded
        given: dict[str, Any] = {"low": low, "count": high - low}
        if term.mapped:
            given["coded_ptr"], coded = coded, coded.new_empty(*coded.shape[:3], dim)
            grid = self._turn_grid(term, high - low, batch, dim)
            self._run(f"restore_{term.space}", grid, {**given, "out_ptr": coded}, None, params)
        if term.masked:
            here = among(self._chosen(term, pool, table, low, high), 1, dim) == term.store.gathers
            coded = torch.where(here, coded, 0.0)
        if term.rope is not None:
            given |= {"coded_ptr": coded, **self._positions(high, pool.device, params)}
            coded = torch.empty_like(coded)
            at = (-(-(high - low) // ROTATE_ROWS), batch * self.plan.shape.kv_heads)
            self._run("rope_keys", at, {**given, "out_ptr": coded}, None, params)
        return coded

    def _unpack(
        self, term: SidePlan, pool: Tensor, table: Tensor, begin: int, end: int, dim: int, params: Params
    ) -> Tensor:
        heads, tile, batch = self.plan.shape.kv_heads, self.plan.tile, table.shape[0]
        out = torch.empty(batch, heads, max(0, end - begin), dim, dtype=torch.float32, device=pool.device)
        given = {"table_ptr": table, "out_ptr": out, "begin": begin, "end": end, "table_width": table.shape[1]}
        steps = -(-end // tile) - begin // tile if end > begin else 0
        for band in term.parts:
            self._run(f"unpack_{band.label}", (steps, batch * heads), given, pool, params)
        return out

    def _positions(self, end: int, device: torch.device, params: Params) -> dict[str, Any]:
        """Cosines and sines of all positions of tokens u below `end`, and of the first ones by channel."""
        rope, dim, frequencies = self.plan.keys.rope, self.plan.shape.head_dim, params[ROPE]
        assert rope is not None
        rows = table(frequencies, dim, self.plan.sinks + end + NEAR, device)
        first = near(frequencies, dim, rope.interleaved, device)
        if self.plan.keys.ordered:
            first = _in_order(first, params["keys.order"])
        return {"rope_ptr": rows, "near_ptr": first, "PAIRS": len(frequencies)}


def _taken(rows: Tensor, first: Tensor, offset: int, low: int, high: int) -> Tensor:
    """Tokens u in [low, high) of every sequence of rows (B, H, total, D), float32 (B, H, high - low, D); those that are
    not there are any."""
    u = torch.arange(low, high, device=rows.device)
    place = offset + torch.remainder(u - first[:, None], rows.shape[2] - offset)
    index = place[:, None, :, None].expand(-1, rows.shape[1], -1, rows.shape[3])
    return rows.gather(2, index).to(torch.float32)


def _beside_rows(term: SidePlan, rows: Tensor, channels: Tensor) -> Tensor:
    """What is kept of rows (B, H, T, D), numbers or codes, at chosen channels: bytes (B, H, T / 32, size)."""
    held, tokens = term.beside, term.choice.tokens
    assert held is not None
    found = together(rows, channels, tokens, held.bits) if held.below else kept_there(rows, channels, tokens)
    return found.unflatten(2, (-1, PUT_TOKENS // held.together)).flatten(3)


def _in_order(first: Tensor, order: Tensor) -> Tensor:
    """The waves `first` of all heads, in their orders: made once for those that are used again in every step."""
    known = WAVES.get(order)
    if known is None or known[0] is not first:
        known = WAVES[order] = (first, in_order(first, order))
    found: Tensor = known[1]
    return found
