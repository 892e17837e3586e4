"""Launching generated Triton kernels: grids, scratch, views of the pool.  The Module of the triton backend."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from triton.runtime.errors import OutOfResources

from kvdsl.errors import BackendError
from kvdsl.kernels import AttentionState, Params, Side
from kvdsl.params import ROPE
from kvdsl.rope import NEAR, in_order, near, table

from .assembling import fewest_spills
from .chunks import mapping, rows_of
from .host import cartesian, polar, saturated
from .host_slots import Split, by_channel, by_turned_channel, kept, split
from .launch import DEPTH, assembled
from .launches import ASSEMBLER, GIVEN_POINTERS, arguments, fused, stages, warps
from .plan import Plan, SidePlan
from .text import padded
from .triton_rope import ROTATE_ROWS
from .triton_turn import QUERY_LANES, QUERY_ROWS, TURN_LANES, turn_rows

VIEWS = {
    "pool8_ptr": torch.uint8, "pool16_ptr": torch.int16, "pool32_ptr": torch.int32,
    "pool_fp16_ptr": torch.float16, "pool_fp32_ptr": torch.float32,
}  # fmt: skip
NO_WINDOW = 1 << 30
SCRATCH = 1 << 26  # bytes of mapped rows that wait to be packed or mapped back at a time
LOG2E = 1.4426950408889634
# Programs that share a sequence, as measured on an H100 from 1x8x1024 to 8x8x131072 (batch, kv heads, tokens)
FEW_SPLITS, MOST_SPLITS, MOST_EDGES = 24, 128, 32
PAGES_A_SPLIT = 8
COLUMNS = WeakTensorKeyDictionary()
"""Maps -> the same by columns, float64: made once for those that are used again in every step."""
WAVES = WeakTensorKeyDictionary()
"""Orders of the channels of all heads -> the waves of the first positions, and the same in those orders."""
INNER = {"outliers_": ".outliers.store", "residual_": ".residual"}
"""How an argument's name goes on behind a side's -> its term's place behind the side's."""
Setting = tuple[int, str | None]
"""Depth of the pipeline, setting of the assembler."""


class TritonModule:
    """The kernels of one generated module, bound to torch tensors."""

    def __init__(self, plan: Plan, module: ModuleType, source: str) -> None:
        self.plan, self.module = plan, module
        self.arguments = arguments(source)
        self.settings: dict[str, Setting] = {}  # kernel -> those found best

    def _run(
        self, kernel: str, grid: tuple[int, ...], given: Mapping[str, Any], pool: Tensor | None, params: Params
    ) -> None:
        if 0 in grid:
            return
        values = dict(given)
        for name in self.arguments[kernel]:
            if name in VIEWS:
                assert pool is not None
                values[name] = pool.view(VIEWS[name])
            elif name in GIVEN_POINTERS:
                values[name] = params[GIVEN_POINTERS[name]]
            elif name not in values and name.startswith(("keys_", "values_")):
                values[name] = _parameter(name, params)
        function = getattr(self.module, kernel)[grid]
        options = {"num_warps": warps(kernel, self.plan), "enable_fp_fusion": fused(kernel)}

        def launch(depth: int, setting: str | None) -> Any:
            """Run the kernel; gives what Triton compiled."""
            given = {name: depth if name == DEPTH else values[name] for name in self.arguments[kernel]}
            return function(**given, **options, num_stages=depth, **assembled(setting))

        if kernel in self.settings:
            launch(*self.settings[kernel])
            return
        refused, found = None, dict[Setting, int]()
        for depth in stages(kernel, self.plan):
            try:
                setting, spills = _setting(partial(launch, depth))
            except OutOfResources as error:
                refused = error
                continue
            found[depth, setting] = spills
            if not spills:
                break
        if not found:
            raise BackendError(f"{kernel} does not fit this GPU: {refused}")
        self.settings[kernel] = min(found, key=lambda one: found[one])

    def pack(self, side: Side, rows: Tensor, first: Tensor, offset: int, begin: Tensor, end: Tensor,
             reach: tuple[int, int], pool: Tensor, table: Tensor, params: Params) -> None:  # fmt: skip
        part, rows = self.plan.side(side), rows.contiguous()
        if not part.turned and part.residual is None:
            self._pack(part, rows, first, offset, begin, end, reach, pool, table, params)
            return
        for low, high in self._chunks(part, *reach, rows.shape[0]):
            at, source, start, taken = first, rows, offset, None
            if part.rope is not None:
                source = self._without_positions(rows, first, offset, begin, end, (low, high), params)
            elif part.sparse:
                source = rows_of(rows, first, offset, low, high)
            if source is not rows:
                at, start = torch.full_like(first, low), 0
            if part.sparse:
                taken = split(source, part.sparse, side, params.get(f"{side}.outliers"))
            for term in part.spaces:
                if taken is not None and term.slots:
                    self._pack_slots(term, source, taken, begin, end, (low, high), pool, table)
                else:
                    given = taken.filled if taken is not None and term is part else source
                    self._pack_term(term, given, at, start, begin, end, (low, high), pool, table, params)
                if term.residual is not None:
                    # what is left of the chunk's tokens, in rows of their own
                    source = saturated(rows_of(source, at, start, low, high)) - self._decoded(
                        term, pool, table, low, high, params
                    )
                    at, start = torch.full_like(first, low), 0

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
                   reach: tuple[int, int], pool: Tensor, table: Tensor, params: Params) -> None:  # fmt: skip
        """Write one term, or all bands, of a chunk's tokens u in `reach`, without their positions."""
        if not term.mapped and not term.polar:
            self._pack(term, rows, first, offset, begin, end, reach, pool, table, params)
            return
        low, high = reach
        given, beside = mapping(rows, first, offset, begin, end, reach, term.stride), {}
        coded = given["out_ptr"]
        if term.sketched:
            beside["squares_ptr"] = torch.empty(coded.shape[:3], dtype=torch.float64, device=rows.device)
        if term.mapped:
            grid = self._turn_grid(term, high - low, len(rows), term.stride)
            self._run(f"turn_{term.space}", grid, given | beside, None, params)
        else:
            coded = rows_of(rows, first, offset, low, high)
        coded = polar(coded, term.store.levels) if term.polar else coded
        at = torch.full_like(first, low)
        for band in term.parts:
            self._pack(band, coded, at, 0, begin, end, reach, pool, table, params, beside)

    def _without_positions(self, rows: Tensor, first: Tensor, offset: int, begin: Tensor, end: Tensor,
                           reach: tuple[int, int], params: Params) -> Tensor:  # fmt: skip
        """Keys of a chunk's tokens u in `reach`, as far as they are in [begin, end), float32 (B, H, tokens, D)."""
        given = mapping(rows, first, offset, begin, end, reach, rows.shape[3])
        grid = (-(-(reach[1] - reach[0]) // ROTATE_ROWS), rows.shape[0] * rows.shape[1])
        self._run("unrope_keys", grid, given | self._positions(reach[1], rows.device, params), None, params)
        found: Tensor = given["out_ptr"]
        return found

    def _chunks(self, part: SidePlan, low: int, high: int, batch: int) -> list[tuple[int, int]]:
        """Spans of tokens whose mapped rows fit SCRATCH, cut at whole programs of `pack`."""
        span = math.lcm(*(term.span for term in part.terms))
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
            whole = sum(reversed(others), last)  # each store's number plus that of all that it left
            found.append(whole if part.rope is None else self._at_positions(whole, low, params))
        return found[0] if len(found) == 1 else torch.cat(found, 2)

    def _at_positions(self, x: Tensor, low: int, params: Params) -> Tensor:
        """Keys (B, H, tokens, D) of the tokens from u = low on, with their positions."""
        batch, heads, count, _ = x.shape
        out = torch.empty_like(x)
        given = {"coded_ptr": x, "low": low, "count": count, "out_ptr": out}
        given |= self._positions(low + count, x.device, params)
        self._run("rope_keys", (-(-count // ROTATE_ROWS), batch * heads), given, None, params)
        return out

    def _decoded(self, term: SidePlan, pool: Tensor, table: Tensor, low: int, high: int, params: Params) -> Tensor:
        """One term, or all bands, of tokens u in [low, high) without positions, float32 (B, H, high - low, D)."""
        batch, dim = table.shape[0], self.plan.shape.head_dim
        coded = self._unpack(term, pool, table, low, high, term.stride, params)
        coded = cartesian(coded, term.store.levels) if term.polar else coded
        if not term.mapped:
            return coded
        out = coded.new_empty(*coded.shape[:3], dim)
        given = {"coded_ptr": coded, "count": high - low, "out_ptr": out}
        self._run(f"restore_{term.space}", self._turn_grid(term, high - low, batch, dim), given, None, params)
        return out

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

    def _query(self, query: Tensor, end: int, params: Params) -> dict[str, Any]:
        """The query, and where keys are mapped what it becomes for packed tokens, u below `end`."""
        keys, shape = self.plan.keys, self.plan.shape
        query = query.contiguous()
        given = {"query_ptr": query}
        if keys.rope is not None:
            if keys.sparse:
                gathered = by_turned_channel(query, shape.kv_heads, len(params[ROPE]), keys.rope.interleaved)
                given["gathered_ptr"] = gathered
            return given | self._positions(end, query.device, params)
        if keys.sparse:
            given["gathered_ptr"] = by_channel(query, shape.kv_heads)
        if not keys.through:
            return given
        batch, _, queries, _ = query.shape
        given["turned_ptr"] = query.new_empty(*query.shape[:3], keys.row, dtype=torch.float32)
        if keys.shifted:
            given["bias_ptr"] = query.new_empty(query.shape[:3], dtype=torch.float32)
        blocks = -(-queries * shape.group // QUERY_ROWS)
        grid = (batch * shape.kv_heads, -(-keys.row // QUERY_LANES), blocks)
        self._run("turn_query", grid, {**given, "queries": queries}, None, params)
        return given

    def scores(self, query: Tensor, pool: Tensor, table: Tensor, tokens: int, params: Params) -> Tensor:
        shape = self.plan.shape
        batch, heads, queries, _ = query.shape
        out = torch.empty(batch, heads, queries, tokens, dtype=torch.float32, device=query.device)
        blocks = -(-queries * shape.group // self.plan.rows(many=True))
        given = {
            **self._query(query, tokens, params), "table_ptr": table, "out_ptr": out, "queries": queries,
            "table_width": table.shape[1], "tokens": tokens, "scaling": 1.0,
        }  # fmt: skip
        self._run("scores", (batch * shape.kv_heads, -(-tokens // self.plan.tile), blocks), given, pool, params)
        return out

    def splits(self, programs: int, longest: int) -> int:
        """How many programs share one sequence: enough to fill the machine, but with some pages each, as what they
        found must be merged."""
        pages = max(1, -(-longest // self.plan.layout.page_tokens))
        if not torch.cuda.is_available():
            return min(2, pages)
        worthwhile = max(FEW_SPLITS, pages // PAGES_A_SPLIT)
        return max(1, min(pages, 8 * self.processors() // max(1, programs), worthwhile, MOST_SPLITS))

    def edge_splits(self, programs: int, state: AttentionState) -> int:
        """How many programs share the edges of one sequence: one a tile while the machine has room for them, else one
        for two tiles."""
        cut = 1 if state.window is None else 2  # pages that are read as edges: the newest, and where a window begins
        exact = min(state.longest, state.key_rows.shape[2] + cut * self.plan.layout.page_tokens)
        tiles = min(-(-exact // self.plan.edge_tile), MOST_EDGES)
        return tiles if programs * tiles <= 2 * self.processors() else max(1, tiles // 2)

    def processors(self) -> int:
        """Multiprocessors of the GPU; 1 where kernels are interpreted."""
        if not torch.cuda.is_available():
            return 1
        return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count

    def attend(
        self, query: Tensor, state: AttentionState, params: Params, splits: int | None = None
    ) -> tuple[Tensor, Tensor]:
        shape, plan = self.plan.shape, self.plan
        batch, heads, queries, dim = query.shape
        kernel = "decode" if queries == 1 else "extend"
        rows = plan.rows(many=queries > 1)
        blocks = -(-queries * shape.group // rows)
        programs = batch * shape.kv_heads
        if splits is None:
            clean, edges = self.splits(programs * blocks, state.longest), self.edge_splits(programs * blocks, state)
        else:  # a fixed plan: what a sequence gets must not depend on who else is in the batch
            clean = edges = splits
        count = clean + edges
        floats = partial(torch.empty, dtype=torch.float32, device=query.device)
        results = {"partial_ptr": floats(programs * blocks * count * rows * plan.values.row)}
        results["lse_ptr"] = floats(programs * blocks * count * rows)
        if plan.values.apart:  # sums over exact rows, which the map of the values does not touch
            results["exact_ptr"] = floats(programs * blocks * edges * rows * dim)
            results["share_ptr"] = floats(programs * blocks * edges * rows)
        capped = state.softcap is not None
        given = {
            **self._query(query, state.longest, params), "table_ptr": state.table, "packed_keys_ptr": state.packed_keys,
            "packed_values_ptr": state.packed_values, "length_ptr": state.length, "start_ptr": state.start,
            "first_ptr": state.first, "key_rows_ptr": state.key_rows, "value_rows_ptr": state.value_rows,
            **results, "queries": queries, "table_width": state.table.shape[1],
            "ring": state.key_rows.shape[2] - plan.sinks,
            "window": NO_WINDOW if state.window is None else state.window, "splits": clean, "edge_splits": edges,
            "scaling": state.scaling * (1.0 if capped else LOG2E), "softcap": state.softcap if capped else 1.0,
        }  # fmt: skip
        self._run(kernel, (programs, count, blocks), given, state.pool, params)
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        out_lse = floats(batch, heads, queries)
        as_words = out.view(torch.int16) if query.dtype == torch.bfloat16 else out
        given = {
            **results, "out_ptr": as_words, "out_lse_ptr": out_lse, "queries": queries, "blocks": blocks,
            "splits": count, "clean": clean, "ROWS": rows, "SPLITS": padded(count),
        }  # fmt: skip
        self._run("merge", (batch * heads, queries), given, None, params)
        return out, out_lse


def _setting(launch: Callable[[str | None], Any]) -> tuple[str | None, int]:
    """The setting of the assembler to launch a kernel under, which was launched under it, and what it spills.

    Where the assembler does not run alone, Triton compiles the kernel under one setting after another.
    """
    compiled = launch(ASSEMBLER[0])
    spills: dict[str | None, int] = {ASSEMBLER[0]: _spills(compiled)}
    if not spills[ASSEMBLER[0]]:
        return ASSEMBLER[0], 0
    try:
        settings: tuple[str | None, ...] = (fewest_spills(compiled, ASSEMBLER)[0],)
    except BackendError:
        settings = ASSEMBLER[1:]
    for setting in settings:
        spills[setting] = _spills(launch(setting))
        if not spills[setting]:
            break
    best = settings[0] if len(settings) == 1 else min(spills, key=lambda one: spills[one])
    return best, spills[best]


def _spills(compiled: Any) -> int:
    """Numbers that a kernel keeps in memory for want of registers; none where it was interpreted."""
    return getattr(compiled, "n_spills", 0) or 0


def _in_order(first: Tensor, order: Tensor) -> Tensor:
    """The waves `first` of all heads, in their orders: made once for those that are used again in every step."""
    known = WAVES.get(order)
    if known is None or known[0] is not first:
        known = WAVES[order] = (first, in_order(first, order))
    found: Tensor = known[1]
    return found


def _parameter(name: str, params: Params) -> Tensor | int:
    """A kernel's argument that comes from the parameters: `keys_scale_ptr`, `keys_encode_ptr`, or how far apart one
    head's map (`keys_stride`) or shift (`keys_shifts`) is from the next; 0 where heads share it."""
    side, _, what = name.removesuffix("_ptr").partition("_")
    while inner := next(filter(what.startswith, INNER), None):
        side, what = side + INNER[inner], what.removeprefix(inner)
    if what.endswith("stride"):
        matrix = params[f"{side}.{'read' if what == 'read_stride' else 'encode'}"]
        return matrix.shape[1] * matrix.shape[2] if matrix.shape[0] > 1 else 0
    if what == "shifts":
        return int(params[f"{side}.encode_shift"].shape[0] > 1)
    if what.endswith("_columns"):
        matrix = params[f"{side}.{what.removesuffix('_columns')}"]
        if matrix not in COLUMNS:
            COLUMNS[matrix] = matrix.mT.to(torch.float64).contiguous()
        columns: Tensor = COLUMNS[matrix]
        return columns
    return params[f"{side}.{what}"]
