"""Attention with generated Triton kernels: grids and scratch.  The Module of the triton backend."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from kvdsl.kernels import AttentionState, Params
from kvdsl.params import ROPE

from .host_channels import ready_rows
from .host_slots import by_channel, by_turned_channel
from .plan import SidePlan
from .run_pages import PageModule
from .text import padded
from .triton_masked import BESIDE, alike
from .triton_turn import QUERY_LANES, QUERY_ROWS

NO_WINDOW = 1 << 30
LOG2E = 1.4426950408889634
# Programs that share a sequence, as measured on an H100 from 1x8x1024 to 8x8x131072 (batch, kv heads, tokens)
FEW_SPLITS, MOST_SPLITS, MOST_EDGES = 24, 128, 32
PAGES_A_SPLIT = 8
ROWS = WeakTensorKeyDictionary()
"""Maps of sketches -> their rows, ready for codes: made once for those that are used again in every step."""


class TritonModule(PageModule):
    """The kernels of one generated module, bound to torch tensors."""

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
        if any(term.store.gathers for term in keys.terms):
            given["gathered_ptr"] = by_channel(query, shape.kv_heads)
        if keys.masked:
            maps = keys.terms[: 1 if alike(self.plan) else 2]
            given.update({f"{term.space}_rows_ptr": self._rows_of_map(term, params) for term in maps})
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

    def _rows_of_map(self, term: SidePlan, params: Params) -> Tensor:
        """The rows of a sketch's map, a channel each, as queries that are ready for codes, each with its sum behind it:
        (H or 1, D, M + 8); made once."""
        matrix = params[f"{term.home}.decode"]
        if matrix not in ROWS:
            dtype = torch.float32 if self.plan.exact_keys else torch.float16
            ROWS[matrix] = ready_rows(term, matrix, BESIDE).to(dtype).contiguous()
        rows: Tensor = ROWS[matrix]
        return rows

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
