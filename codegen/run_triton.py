"""Launching generated Triton kernels: grids, scratch, views of the pool.  The Module of the triton backend."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kvdsl.kernels import AttentionState, Params, Side

from .launch import assembled
from .launches import ASSEMBLER, GIVEN_POINTERS, arguments, stages, warps
from .plan import Plan
from .text import padded

VIEWS = {
    "pool8_ptr": torch.uint8, "pool16_ptr": torch.int16, "pool32_ptr": torch.int32,
    "pool_fp16_ptr": torch.float16, "pool_fp32_ptr": torch.float32,
}  # fmt: skip
NO_WINDOW = 1 << 30
LOG2E = 1.4426950408889634


class TritonModule:
    """The kernels of one generated module, bound to torch tensors."""

    def __init__(self, plan: Plan, module: ModuleType, source: str) -> None:
        self.plan, self.module = plan, module
        self.arguments = arguments(source)
        self.settings: dict[str, tuple[str | None, ...]] = {}  # kernel -> the assembler's setting found best

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
        fusion = not kernel.startswith(("pack", "unpack"))
        function = getattr(self.module, kernel)
        ordered = {name: values[name] for name in self.arguments[kernel]}
        options = {"num_warps": warps(kernel, self.plan), "num_stages": stages(kernel), "enable_fp_fusion": fusion}
        spills: dict[str | None, int] = {}
        for setting in self.settings.get(kernel, ASSEMBLER):
            compiled = function[grid](**ordered, **options, **assembled(setting))
            spills[setting] = getattr(compiled, "n_spills", 0) or 0
            if not spills[setting]:
                break
        self.settings[kernel] = (min(spills, key=lambda one: spills[one]),)

    def pack(self, side: Side, rows: Tensor, first: Tensor, offset: int, begin: Tensor, end: Tensor,
             reach: tuple[int, int], pool: Tensor, table: Tensor, params: Params) -> None:  # fmt: skip
        span = self.plan.span(side)
        batch, heads = rows.shape[:2]
        low, high = reach[0] // span, -(-reach[1] // span)
        given = {
            "rows_ptr": rows.contiguous(), "first_ptr": first, "begin_ptr": begin, "end_ptr": end, "table_ptr": table,
            "total_rows": rows.shape[2], "offset": offset, "ring": rows.shape[2] - offset,
            "table_width": table.shape[1], "first_step": low,
        }  # fmt: skip
        self._run(f"pack_{side}", (max(0, high - low), batch * heads), given, pool, params)

    def unpack(self, side: Side, pool: Tensor, table: Tensor, begin: int, end: int, params: Params) -> Tensor:
        shape, tile = self.plan.shape, self.plan.tile
        batch = table.shape[0]
        out = torch.empty(batch, shape.kv_heads, end - begin, shape.head_dim, dtype=torch.float32, device=pool.device)
        given = {"table_ptr": table, "out_ptr": out, "begin": begin, "end": end, "table_width": table.shape[1]}
        steps = -(-end // tile) - begin // tile if end > begin else 0
        self._run(f"unpack_{side}", (steps, batch * shape.kv_heads), given, pool, params)
        return out

    def scores(self, query: Tensor, pool: Tensor, table: Tensor, tokens: int, params: Params) -> Tensor:
        shape = self.plan.shape
        batch, heads, queries, _ = query.shape
        out = torch.empty(batch, heads, queries, tokens, dtype=torch.float32, device=query.device)
        blocks = -(-queries * shape.group // self.plan.rows(many=True))
        given = {
            "query_ptr": query.contiguous(), "table_ptr": table, "out_ptr": out, "queries": queries,
            "table_width": table.shape[1], "tokens": tokens, "scaling": 1.0,
        }  # fmt: skip
        self._run("scores", (batch * shape.kv_heads, -(-tokens // self.plan.tile), blocks), given, pool, params)
        return out

    def splits(self, programs: int, longest: int) -> int:
        """How many programs share one sequence: enough to fill the machine, each with a page at least."""
        pages = max(1, -(-longest // self.plan.layout.page_tokens))
        if not torch.cuda.is_available():
            return min(2, pages)
        return max(1, min(pages, 8 * self.processors() // max(1, programs), 128))

    def edge_splits(self, programs: int, state: AttentionState) -> int:
        """How many programs share the edges of one sequence: one a tile while the machine has room for them."""
        exact = min(state.longest, state.key_rows.shape[2] + 2 * self.plan.layout.page_tokens)
        tiles = -(-exact // self.plan.edge_tile)
        return max(1, min(tiles, -(-4 * self.processors() // max(1, programs)), 32))

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
        clean = splits or self.splits(programs * blocks, state.longest)
        edges = self.edge_splits(programs * blocks, state)
        count = clean + edges
        partial = torch.empty(programs * blocks * count * rows * dim, dtype=torch.float32, device=query.device)
        lse = torch.empty(programs * blocks * count * rows, dtype=torch.float32, device=query.device)
        capped = state.softcap is not None
        given = {
            "query_ptr": query.contiguous(), "table_ptr": state.table, "packed_keys_ptr": state.packed_keys,
            "packed_values_ptr": state.packed_values, "length_ptr": state.length, "start_ptr": state.start,
            "first_ptr": state.first, "key_rows_ptr": state.key_rows, "value_rows_ptr": state.value_rows,
            "partial_ptr": partial, "lse_ptr": lse, "queries": queries, "table_width": state.table.shape[1],
            "ring": state.key_rows.shape[2] - plan.sinks,
            "window": NO_WINDOW if state.window is None else state.window, "splits": clean,
            "edge_splits": edges,
            "scaling": state.scaling * (1.0 if capped else LOG2E), "softcap": state.softcap if capped else 1.0,
            "STAGES": stages(kernel),
        }  # fmt: skip
        self._run(kernel, (programs, count, blocks), given, state.pool, params)
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        out_lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=query.device)
        as_words = out.view(torch.int16) if query.dtype == torch.bfloat16 else out
        given = {
            "partial_ptr": partial, "lse_ptr": lse, "out_ptr": as_words, "out_lse_ptr": out_lse, "queries": queries,
            "blocks": blocks, "splits": count, "ROWS": rows, "SPLITS": padded(count),
        }  # fmt: skip
        self._run("merge", (batch * heads, queries), given, None, params)
        return out, out_lse
