"""Packing into pages and unpacking, with generated Triton kernels: what terms are given, scratch, rotary positions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from kvdsl.appending import pack_due
from kvdsl.kernels import Params, Places, Room, Side
from kvdsl.params import ROPE
from kvdsl.rope import NEAR, in_order, near, table
from kvdsl.scheme import SIDES

from .chunks import mapping, rows_of
from .host import saturated
from .host_balance import balanced
from .host_beside import Taken, level_counts, placed, rows_there
from .host_channels import among, choose
from .host_channels import given as beside
from .host_maps import cartesian, polar
from .host_slots import kept, split
from .plan import SidePlan
from .run_kernels import KernelModule
from .text import padded
from .triton_append import packs
from .triton_beside_pages import PUT_TOKENS
from .triton_rope import ROTATE_ROWS
from .triton_turn import TURN_LANES, turn_rows

SCRATCH = 1 << 26  # bytes of mapped rows that wait to be packed or mapped back at a time
WAVES = WeakTensorKeyDictionary()
"""Orders of the channels of all heads -> the waves of the first positions, and the same in those orders."""


class PageModule(KernelModule):
    """The kernels of one generated module that write pages and read them back."""

    def pack(self, side: Side, rows: Tensor, first: Tensor, offset: int, begin: Tensor, end: Tensor,
             reach: tuple[int, int], pool: Tensor, table: Tensor, params: Params,
             places: Places | None = None) -> None:  # fmt: skip
        part, rows = self.plan.side(side), rows.contiguous()
        if part.shared:  # packed with the keys
            return
        if not part.turned and part.residual is None:
            for term in part.parts:
                self._pack(term, rows, first, offset, begin, end, reach, pool, table, params)
            return
        for low, high in self._chunks(part, *reach, rows.shape[0]):
            at, source, start, taken, chosen, above = first, rows, offset, None, None, None
            if part.rope is not None:
                source = self._without_positions(part, rows, first, offset, begin, end, (low, high), params, places)
            elif part.sparse or part.parted:
                source = rows_of(rows, first, offset, low, high)
            if source is not rows:
                at, start = torch.full_like(first, low), 0
            if part.sparse:
                taken = split(source, part.sparse, side, params.get(f"{side}.outliers"))
            if part.parted:
                channels = choose(source, part.parted.choice)
                chosen = Taken(channels, among(channels, part.choice.tokens, source.shape[3]))
                which = {"bytes_ptr": channels.to(torch.uint8)}
                self._put(f"put_{part.space}_channels", which, begin, end, low, pool, table)
            for term in part.spaces:
                if taken is not None and term.slots:
                    numbers = kept(source, taken, side)
                    slots = {"numbers_ptr": numbers, "places_ptr": taken.places.to(torch.uint8)}
                    self._put(f"pack_{term.label}", slots, begin, end, low, pool, table)
                elif chosen is not None and term.beside:
                    there = {"bytes_ptr": _beside_rows(term, source if above is None else above, chosen.channels)}
                    self._put(f"put_{term.space}", there, begin, end, low, pool, table)
                else:
                    given, raised = taken.filled if taken is not None and term is part else source, {}
                    if chosen is not None and term.parted:
                        given = beside(term.parted, source, chosen.theirs)
                    if chosen is not None and term.raised:
                        # 0 for tokens that are not there: the host looks at all, as in `mapping`
                        above = torch.zeros(given.shape, dtype=torch.uint8, device=given.device)
                        raised = {"counts_ptr": level_counts(term, chosen.theirs), "above_ptr": above}
                    self._pack_term(term, given, at, start, begin, end, (low, high), pool, table, params, raised)
                if term.residual is not None:
                    # what is left of the chunk's tokens, in rows of their own
                    source = saturated(rows_of(source, at, start, low, high)) - self._decoded(
                        term, pool, table, low, high, params
                    )
                    at, start = torch.full_like(first, low), 0

    @cached_property
    def packs_at_once(self) -> tuple[Side, ...]:
        """See KernelSet."""
        sides = {side: self.plan.side(side) for side in SIDES}
        return tuple(side for side, about in sides.items() if about.shared or packs(about))

    def append(self, keys: Tensor, values: Tensor, into: Room, params: Params) -> None:
        batch, heads, _, _ = keys.shape
        given = {
            "fresh_keys_ptr": keys.contiguous(), "fresh_values_ptr": values.contiguous(),
            "key_rows_ptr": into.key_rows, "value_rows_ptr": into.value_rows, "length_ptr": into.length,
            "packed_keys_ptr": into.packed["keys"], "packed_values_ptr": into.packed["values"],
            "due_keys_ptr": into.due["keys"], "due_values_ptr": into.due["values"], "table_ptr": into.table,
            "table_width": into.table.shape[1], "ring": into.key_rows.shape[2] - self.plan.sinks,
        }  # fmt: skip
        self._run("append", (batch * heads, 2), given, into.pool, params)
        for side in SIDES:
            if side not in self.packs_at_once:
                pack_due(self.pack, side, into, params, self.plan.sinks, self.plan.layout.page_tokens)

    def _put(self, kernel: str, rows: Mapping[str, Tensor], begin: Tensor, end: Tensor, low: int, pool: Tensor,
             table: Tensor) -> None:  # fmt: skip
        """Write rows, each (B, H, blocks, ...), of tokens from u = low on."""
        batch, heads, blocks = next(iter(rows.values())).shape[:3]
        given = {name: tensor.contiguous() for name, tensor in rows.items()}
        given |= {"begin_ptr": begin, "end_ptr": end, "table_ptr": table}
        sizes = {"table_width": table.shape[1], "low": low, "blocks": blocks}
        self._run(kernel, (blocks, batch * heads), given | sizes, pool, {})

    def _chosen(self, term: SidePlan, pool: Tensor, table: Tensor, low: int, high: int) -> Tensor:
        """Which channels are chosen for each of the tokens u in [low, high): uint8 (B, H, high - low, count)."""
        layout, held = self.plan.layout, term.choice
        first, last = low // layout.page_tokens, -(-high // layout.page_tokens)
        blobs = pool[:, : layout.head_bytes * layout.kv_heads].unflatten(1, (layout.kv_heads, layout.head_bytes))
        section = blobs[:, :, held.offset : held.offset + held.blocks * held.count]
        channels = section[table[:, first:last].long()].unflatten(-1, (held.blocks, held.count))
        of_tokens = channels.movedim(2, 1).flatten(2, 3).repeat_interleave(held.tokens, 2)
        return of_tokens[:, :, low - first * layout.page_tokens :][:, :, : high - low]

    def _pack_term(self, term: SidePlan, rows: Tensor, first: Tensor, offset: int, begin: Tensor, end: Tensor,
                   reach: tuple[int, int], pool: Tensor, table: Tensor, params: Params,
                   raised: Mapping[str, Tensor]) -> None:  # fmt: skip
        """Write one term, or all bands, of a chunk's tokens u in `reach`, without their positions; `raised`: of
        channels with more bits."""
        if not term.mapped and not term.polar and not term.layout.across:
            self._pack(term, rows, first, offset, begin, end, reach, pool, table, params, raised)
            return
        low, high = reach
        seen = bool(term.polar or term.layout.across)
        given, beside = mapping(rows, first, offset, begin, end, reach, term.stride, seen=seen), {}
        coded = given["out_ptr"]
        if term.sketched:
            beside["squares_ptr"] = torch.empty(coded.shape[:3], dtype=torch.float64, device=rows.device)
        if term.mapped:
            grid = self._turn_grid(term, high - low, len(rows), term.stride)
            self._run(f"turn_{term.space}", grid, given | beside, None, params)
        else:
            coded = rows_of(rows, first, offset, low, high)
            coded = saturated(coded) if term.rope is None else coded
        coded = polar(coded, term.store.levels) if term.polar else coded
        if term.layout.across:
            coded, factors = balanced(term, coded)
            self._put(f"put_{term.space}_across", {"bytes_ptr": factors}, begin, end, low, pool, table)
        at = torch.full_like(first, low)
        for band in term.parts:
            self._pack(band, coded, at, 0, begin, end, reach, pool, table, params, beside)

    def _without_positions(self, part: SidePlan, rows: Tensor, first: Tensor, offset: int, begin: Tensor, end: Tensor,
                           reach: tuple[int, int], params: Params, places: Places | None) -> Tensor:  # fmt: skip
        """Keys of a chunk's tokens u in `reach`, as far as they are in [begin, end), float32 (B, H, tokens, D)."""
        given = mapping(rows, first, offset, begin, end, reach, rows.shape[3], seen=True)
        grid = (-(-(reach[1] - reach[0]) // ROTATE_ROWS), rows.shape[0] * rows.shape[1])
        self._run("unrope_keys", grid, given | self._positions(reach[1], rows.device, params, places), None, params)
        found: Tensor = given["out_ptr"]
        return found

    def _chunks(self, part: SidePlan, low: int, high: int, batch: int) -> list[tuple[int, int]]:
        """Spans of tokens whose mapped rows fit SCRATCH, cut at whole programs of `pack`."""
        span = math.lcm(*(term.span for term in part.terms), part.choice.tokens if part.parted else 1)
        span = math.lcm(span, part.layout.across.tokens if part.layout.across else 1)
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

    def unpack(
        self, side: Side, pool: Tensor, table: Tensor, begin: int, end: int, params: Params,
        places: Places | None = None, dtype: torch.dtype = torch.float32,
    ) -> Tensor:  # fmt: skip
        """See KernelSet; what is decoded is rounded to `dtype` where a kernel stores it."""
        part, batch = self.plan.side(side), table.shape[0]
        dim = part.channels
        if not part.turned and part.residual is None or begin >= end:
            return self._unpack(part, pool, table, begin, end, dim, params, dtype)
        found = []
        for low, high in self._chunks(part, begin, end, batch):
            *others, last = (self._decoded(term, pool, table, low, high, params) for term in part.spaces)
            whole = sum(reversed(others), last)  # each store's number plus that of all that it left
            found.append((whole if part.rope is None else self._at_positions(whole, low, params, places)).to(dtype))
        return found[0] if len(found) == 1 else torch.cat(found, 2)

    def _at_positions(self, x: Tensor, low: int, params: Params, places: Places | None) -> Tensor:
        """Keys (B, H, tokens, D) of the tokens from u = low on, with their positions."""
        batch, heads, count, _ = x.shape
        out = torch.empty_like(x)
        given = {"coded_ptr": x, "low": low, "count": count, "out_ptr": out}
        given |= self._positions(low + count, x.device, params, places)
        self._run("rope_keys", (-(-count // ROTATE_ROWS), batch * heads), given, None, params)
        return out

    def _decoded(self, term: SidePlan, pool: Tensor, table: Tensor, low: int, high: int, params: Params) -> Tensor:
        """One term, or all bands, of tokens u in [low, high) without positions, float32 (B, H, high - low, D)."""
        batch, dim = table.shape[0], self.plan.shape.head_dim
        coded = self._unpack(term, pool, table, low, high, term.stride, params)
        if term.beside:
            return placed(coded, self._chosen(term, pool, table, low, high), 1, dim)
        coded = cartesian(coded, term.store.levels) if term.polar else coded
        if not term.mapped:
            return coded
        out = coded.new_empty(*coded.shape[:3], dim)
        given = {"coded_ptr": coded, "count": high - low, "out_ptr": out}
        self._run(f"restore_{term.space}", self._turn_grid(term, high - low, batch, dim), given, None, params)
        if term.masked:
            here = among(self._chosen(term, pool, table, low, high), 1, dim) == term.store.gathers
            return torch.where(here, out, 0.0)
        return out

    def _unpack(
        self, term: SidePlan, pool: Tensor, table: Tensor, begin: int, end: int, dim: int, params: Params,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:  # fmt: skip
        heads, tile, batch = self.plan.shape.kv_heads, self.plan.tile, table.shape[0]
        out = torch.empty(batch, heads, max(0, end - begin), dim, dtype=dtype, device=pool.device)
        given = {"table_ptr": table, "out_ptr": out, "begin": begin, "end": end, "table_width": table.shape[1]}
        steps = -(-end // tile) - begin // tile if end > begin else 0
        for band in term.parts:
            self._run(f"unpack_{band.label}", (steps, batch * heads), given, pool, params)
        return out

    def _positions(
        self, end: int, device: torch.device, params: Params, places: Places | None = None
    ) -> dict[str, Any]:
        """Cosines and sines of all positions of tokens u below `end`, and of the first ones by channel; or of all
        positions that there are, and where tokens stand."""
        rope, dim, frequencies = self.plan.keys.rope, self.plan.shape.head_dim, params[ROPE]
        assert rope is not None
        if places is not None:
            rows = table(frequencies, dim, places.end, device)
            return {"rope_ptr": rows, "PAIRS": len(frequencies), **self._places(places)}
        rows = table(frequencies, dim, self.plan.sinks + end + NEAR, device)
        first = near(frequencies, dim, rope.interleaved, device)
        if self.plan.keys.ordered:
            first = _in_order(first, params["keys.order"])
        return {"rope_ptr": rows, "near_ptr": first, "PAIRS": len(frequencies)}

    def _places(self, places: Places | None) -> dict[str, Any]:
        """The arguments that say where tokens stand."""
        if places is None:
            return {}
        return {"place_ptr": places.at, "room": places.at.shape[2], "origin": places.origin}


def _beside_rows(term: SidePlan, rows: Tensor, channels: Tensor) -> Tensor:
    """What is kept of rows (B, H, T, D), numbers or codes, at chosen channels: bytes (B, H, T / 32, size)."""
    assert term.beside is not None
    return rows_there(term, rows, channels).unflatten(2, (-1, PUT_TOKENS // term.beside.together)).flatten(3)


def _in_order(first: Tensor, order: Tensor) -> Tensor:
    """The waves `first` of all heads, in their orders: made once for those that are used again in every step."""
    known = WAVES.get(order)
    if known is None or known[0] is not first:
        known = WAVES[order] = (first, in_order(first, order))
    found: Tensor = known[1]
    return found
