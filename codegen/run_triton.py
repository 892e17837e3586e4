"""Attention with generated Triton kernels: grids and scratch.  The Module of the triton backend."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from kvdsl.kernels import AttentionState, Form, Params, Places, Segments
from kvdsl.params import ROPE
from kvdsl.scheme import Scheme
from kvdsl.window import TILE, windows

from . import forms, run_dense
from .host_channels import ready_rows
from .host_maps import sign_words
from .host_slots import by_channel, by_turned_channel
from .launches import decode_warps, merge_tile
from .occupancy import (
    MOST_EDGES,
    MOST_SPLITS,
    Room,
    Work,
    alone,
    edge_splits,
    filling,
    processors,
    ranked,
    splits,
)
from .plan import Plan, SidePlan, drawn
from .run_pages import PageModule
from .run_parts import LOG2E, NO_WINDOW, Part, Scratch, within
from .schedules import KERNEL, Bucket, Schedule
from .text import padded
from .triton_gather import gathers
from .triton_masked import SUMS, alike
from .triton_turn import query_tile

USUAL = 8  # programs that a processor holds at once, of a kernel of which it is not known
ROWS = WeakTensorKeyDictionary()
"""Maps of sketches -> their rows, ready for codes: made once for those that are used again in every step."""
SIGNS = WeakTensorKeyDictionary()
"""Matrices of rotations -> their random signs."""


class TritonModule(PageModule):
    """The kernels of one generated module, bound to torch tensors."""

    def _query(
        self, query: Tensor, end: int, params: Params, places: Places | None = None, *, soon: bool = False
    ) -> dict[str, Any]:
        """The query, and where keys are mapped what it becomes for packed tokens, u below `end`; `soon` as for
        `turned`."""
        keys, shape = self.plan.keys, self.plan.shape
        query = query.contiguous()
        given = {"query_ptr": query}
        if keys.rope is not None:
            if keys.sparse:
                gathered = by_turned_channel(query, shape.kv_heads, len(params[ROPE]), keys.rope.interleaved)
                given["gathered_ptr"] = gathered
            return given | self._positions(end, query.device, params, places)
        if gathers(self.plan) and not self.plan.maps_query:
            given["gathered_ptr"] = by_channel(query, shape.kv_heads)
        if keys.masked:
            maps = keys.terms[: 1 if alike(self.plan) else 2]
            given.update({f"{term.space}_rows_ptr": self._rows_of_map(term, params) for term in maps})
        if self.plan.rotates and drawn(keys):
            given["keys_signs_ptr"] = self._signs(params)
        return given | self.turned(query, params, soon=soon) if self.plan.maps_query else given

    def turned(self, query: Tensor, params: Params, *, soon: bool = False) -> dict[str, Any]:
        """What the query (B, Hq, Q, D) becomes for packed tokens, what is added to scores, the query by channels.
        `soon`: the kernel behind may begin at once, and not where this is stored."""
        keys, shape, given = self.plan.keys, self.plan.shape, dict[str, Any](query_ptr=query)
        batch, _, queries, _ = query.shape
        given["turned_ptr"] = query.new_empty(*query.shape[:3], keys.row, dtype=torch.float32)
        if gathers(self.plan):  # the query itself by channels, as `by_channel`
            given["gathered_ptr"] = query.new_empty(
                batch, shape.kv_heads, shape.head_dim, queries * shape.group, dtype=torch.float32
            )
        if keys.shifted:
            given["bias_ptr"] = query.new_empty(query.shape[:3], dtype=torch.float32)
        rows, lanes = query_tile(keys)
        grid = (-(-batch * queries * shape.group // rows), -(-keys.row // lanes), shape.kv_heads)
        sizes = {"batch": batch, "queries": queries, "soon": int(soon)}
        self._run("turn_query", grid, given | sizes, None, params)
        return given

    def _signs(self, params: Params) -> Tensor:
        """The random signs of the keys' rotation, a bit a channel: (H, D / 32) int32; made once."""
        keys, matrix = self.plan.keys, params[f"{self.plan.keys.space}.encode"]
        if matrix not in SIGNS:
            SIGNS[matrix] = sign_words(matrix, keys.hadamard, self.plan.shape.kv_heads)
        signs: Tensor = SIGNS[matrix]
        return signs

    def _rows_of_map(self, term: SidePlan, params: Params) -> Tensor:
        """The rows of a sketch's map, a channel each, as queries that are ready for codes, their sums behind them
        all: (H or 1, D * (M + 8)); made once."""
        matrix = params[f"{term.home}.decode"]
        if matrix not in ROWS:
            ROWS[matrix] = ready_rows(term, matrix, SUMS).to(torch.float16)
        rows: Tensor = ROWS[matrix]
        return rows

    def scores(
        self, query: Tensor, pool: Tensor, table: Tensor, tokens: int, params: Params, places: Places | None = None
    ) -> Tensor:
        shape = self.plan.shape
        batch, heads, queries, _ = query.shape
        out = torch.empty(batch, heads, queries, tokens, dtype=torch.float32, device=query.device)
        blocks = -(-queries * shape.group // self.plan.rows(many=True))
        given = {
            **self._query(query, tokens, params, places), **self._places(places), "table_ptr": table, "out_ptr": out,
            "queries": queries,
            "table_width": table.shape[1], "tokens": tokens, "scaling": 1.0,
        }  # fmt: skip
        self._run("scores", (batch * shape.kv_heads, -(-tokens // self.plan.tile), blocks), given, pool, params)
        return out

    def splits(self, programs: int, longest: int, kernel: str = "") -> int:
        """How many programs of a kernel share one sequence, see `occupancy.splits`."""
        return self._splits(self._work(programs, longest), kernel)

    def _splits(self, work: Work, kernel: str) -> int:
        return splits(work, self.room(kernel)) if self.on_gpu else min(2, work.pages)

    @cached_property
    def decode_warps(self) -> tuple[int, ...]:
        """Those that programs of decode may have, the usual ones first."""
        return decode_warps(self.plan)

    def _times(self, part: Part) -> int:
        """Warps of a program over the usual: as timing found, else twice as many where each has a page, and every warp
        a partition."""
        if part.fixed or part.form != KERNEL:
            return 1
        return part.times or self._times_of(self._work_of(part), part.clean)

    def _times_of(self, work: Work, clean: int) -> int:
        if len(self.decode_warps) == 1 or not self.on_gpu:
            return 1
        room = self.room(KERNEL)
        return 2 if alone(work, replace(room, warps=2 * room.warps), clean) else 1

    def _alone(self, part: Part) -> bool:
        """Whether each page, or tile, has a program, and every warp a partition."""
        return alone(self._work_of(part), self.room(part.form), part.clean)

    def ranked(self, programs: int, longest: int, depth: int | None = None) -> tuple[int, ...]:
        """Numbers of programs of decode that share a sequence, the model's best first."""
        return ranked(self._work(programs, longest), self.room(KERNEL, depth))

    def filling(self, programs: int, longest: int, depth: int | None = None) -> tuple[int, ...]:
        """Numbers of programs of decode that share a sequence and give all processors as many."""
        return filling(self._work(programs, longest), self.room(KERNEL, depth))

    def _work(self, programs: int, longest: int, exact: int | None = None, window: int | None = None) -> Work:
        """What `programs` read of sequences of up to `longest` tokens.  At the edges are `exact` rows, or as many as
        the scheme leaves, of the newest page half, and all of one that a window cuts."""
        page = self.plan.layout.page_tokens
        exact = _exact(self.plan.scheme) if exact is None else exact
        cut = page // 2 if window is None else page // 2 + page
        tiles = -(-min(longest, exact + cut) // self.plan.edge_tile)
        parts = self.plan.page_tiles if self.plan.tile >= TILE else 1  # smaller ones take as long
        return Work(max(1, programs), max(1, -(-longest // page)), page, tiles, parts, self._partials)

    @cached_property
    def _partials(self) -> int:
        """The most partials of a row that are merged well: fewer where all channels are needed at once, or mapped."""
        names = self.arguments["merge"]
        return MOST_SPLITS + (MOST_EDGES if "LANES" in names and "MERGED" not in names else 0)

    def room(self, kernel: str, depth: int | None = None, times: int = 1) -> Room:
        """What the GPU has for programs of a kernel."""
        held = self.residents.get((kernel, depth, times), USUAL)
        return Room(self.processors(), held, times * self.warps(kernel) if kernel else 1)

    def tuned(self, part: Part) -> Schedule | None:
        """The schedule that was found best by timing for a segment that is alone; None: the model's is taken.  Windows,
        what is taken out of tiers and more programs than those of one query were not timed."""
        if not self.schedules.best or part.form != KERNEL or part.fold is not None or part.state.window is not None:
            return None
        if part.blocks > -(-part.plan.shape.group // part.rows):
            return None
        return self.schedules.best.get(Bucket.of(part.query.shape[0], part.state.longest))

    def by_model(self, programs: int, longest: int) -> Schedule:
        """The model's schedule of decode, where it was launched before; `programs` as for `splits`."""
        work = self._work(programs, longest)
        splits = self._splits(work, KERNEL)
        warps = self._times_of(work, splits) * self.warps(KERNEL)
        return Schedule(splits, self.settings[KERNEL, None, 1][0], warps)

    def fits(self, depth: int) -> bool:
        """Whether decode was launched as deep as was asked for."""
        return any(self.settings.get((KERNEL, depth, times), (0, None))[0] == depth for times in (1, 2))

    def _clean_splits(self, part: Part) -> int:
        """How many programs share the pages of one sequence that all its queries see, or all of it."""
        if part.form != "dense":
            return self._splits(self._work_of(part), part.form)
        tiles = max(1, -(-part.state.longest // run_dense.LEAST))
        return splits(Work(max(1, run_dense.programs(part)), tiles, run_dense.LEAST), Room(self.processors(), 1))

    def edge_splits(self, part: Part, clean: int) -> int:
        """How many more programs share the edges of one sequence whose pages `clean` share, see
        `occupancy.edge_splits`."""
        if not self.on_gpu:
            return 2
        return edge_splits(self._work_of(part), clean, self.room(part.form, part.depth, part.times or 1))

    def _work_of(self, part: Part) -> Work:
        state = part.state
        return self._work(part.programs * part.blocks, state.longest, state.key_rows.shape[2], state.window)

    def unknown(self, kernel: str) -> bool:
        """Whether it is not known yet how many programs of a kernel the GPU holds at once."""
        return (kernel, None, 1) not in self.residents and self.on_gpu

    def processors(self) -> int:
        """Multiprocessors of the GPU; 1 where kernels are interpreted."""
        return processors(torch.cuda.current_device()) if self.on_gpu else 1

    def form(self, queries: int, packed: int, exact: int, window: int | None) -> Form:
        return forms.form(self.plan, queries, packed, exact, window)

    def attend(
        self, query: Tensor, state: AttentionState, params: Params, splits: int | None = None, form: Form | None = None
    ) -> tuple[Tensor, Tensor]:
        return self.union(query, [(self, state, params, None)], splits, form)

    def union(
        self, query: Tensor, segments: Segments, splits: int | None = None, form: Form | None = None
    ) -> tuple[Tensor, Tensor]:
        parts = _parts(query, segments, splits, form)
        unknown = [
            part for part in parts if part.form != "dense" and part.depth is None and part.module.unknown(part.form)
        ]
        if splits is None and unknown:
            # the first launch tells how many programs a processor holds; what is returned must not depend on it.  It
            # has the usual warps, so that a short sequence that becomes a long one does not wait for a compiler
            for part in unknown:
                if part.module._times(part) > 1:
                    part.module._attend(part, part.own(), meanwhile=True)
                part.module._attend(replace(part, fixed=True), part.own())
            parts = _parts(query, segments, splits, form)
        end = next((part for part in parts if part.plain), parts[0])
        if len(parts) == 1 and end.fold is None and end.form != "dense":
            scratch = end.own()
            self._attend(end, scratch)
            return self._output("merge", end, scratch, end.count)
        among = [part.form == "dense" or part.plain and part.rows == end.rows for part in parts]
        counts = [part.count if direct else 1 for part, direct in zip(parts, among, strict=True)]
        scratch, before = end.shared(sum(counts)), 0
        for part, direct, count in zip(parts, among, counts, strict=True):
            into = end.behind(scratch, before)
            if part.form == "dense":
                run_dense.attend(part, into, end.blocks * end.rows)
            elif direct:
                part.module._attend(part, into)
            else:
                part.module._collect(part, into, end)
            part.unfold(into, count, end.rows, end.blocks)
            before += count
        return end.module._output("unite" if end.plan.values.through else "merge", end, scratch, before)

    def _reading(self, query: Tensor, state: AttentionState, params: Params, *, soon: bool = False) -> dict[str, Any]:
        """The arguments of a kernel that reads a state for a query; `soon`: see `turned`."""
        capped, places = state.softcap is not None, state.places
        return {
            **self._query(query, state.longest, params, places, soon=soon), **self._places(places),
            "asked_ptr": None if places is None else places.asked,
            "window": NO_WINDOW if state.window is None else state.window, "queries": query.shape[2],
            "table_ptr": state.table,
            "table_width": state.table.shape[1], "packed_keys_ptr": state.packed_keys,
            "packed_values_ptr": state.packed_values, "length_ptr": state.length, "start_ptr": state.start,
            "first_ptr": state.first, "key_rows_ptr": state.key_rows, "value_rows_ptr": state.value_rows,
            "ring": state.key_rows.shape[2] - self.plan.sinks,
            "scaling": state.scaling * (1.0 if capped else LOG2E), "softcap": state.softcap if capped else 1.0,
        }  # fmt: skip

    def _attend(self, part: Part, into: Scratch, *, meanwhile: bool = False) -> None:
        """Write the partials of a segment of this scheme; `meanwhile`: as for `_run`."""
        state, early = part.state, self.plan.maps_query and self._alone(part)
        given = {
            **self._reading(part.query, state, part.params, soon=early), **into, "splits": part.clean,
            "edge_splits": part.edges, "ahead": state.ahead, "EARLY": (times := self._times(part)) > 1,
        }  # fmt: skip
        grid = (part.programs, part.count, part.blocks)
        self._run(part.form, grid, given, state.pool, part.params, part.depth, times, meanwhile=meanwhile)

    def _collect(self, part: Part, into: Scratch, like: Part) -> None:
        """Write one partial of every row, of the head's own numbers, at its place among those of another segment."""
        own = part.own()
        self._attend(part, own)
        to = {"to_ptr": into["partial_ptr"], "to_lse_ptr": into["lse_ptr"], "to_blocks": like.blocks}
        self._merge("collect", part, own, part.count, **to, TO_ROWS=like.rows)

    def _output(self, kernel: str, part: Part, scratch: Scratch, count: int) -> tuple[Tensor, Tensor]:
        """(out like the query, lse (B, Hq, Q) float32) of `count` partials."""
        out = part.query.new_empty(*part.query.shape[:3], self.plan.values.channels)
        lse = part.floats(*out.shape[:3])
        as_words = out.view(torch.int16) if out.dtype == torch.bfloat16 else out
        self._merge(kernel, part, scratch, count, out_ptr=as_words, out_lse_ptr=lse)
        return out, lse

    def _merge(self, kernel: str, part: Part, scratch: Scratch, count: int, **more: Any) -> None:
        batch, heads, queries, _ = part.query.shape
        given = {
            **scratch, **more, "batch": batch, "queries": queries, "blocks": part.blocks, "splits": count,
            "clean": part.clean, "ROWS": part.rows,
        }  # fmt: skip
        partials, edges, rows = padded(count), max(4, padded(part.edges)), batch * heads * queries
        known = None if part.fixed else rows, self.processors()
        tile, times = merge_tile(self.plan, self.arguments[kernel], partials, edges, *known)
        each = -(-self.plan.values.channels // tile["LANES"])
        if "MERGED" in tile:
            kv_heads = self.plan.shape.kv_heads
            grid = -(-rows // kv_heads // tile["MERGED"]), kv_heads, each
        else:
            grid = batch * heads, queries, each
        self._run(kernel, grid, given | tile | {"SPLITS": partials, "EDGES": edges}, None, part.params, times=times)


@lru_cache(maxsize=256)
def _exact(scheme: Scheme) -> int:
    """Rows of exact tokens that a sequence has room for."""
    return max(one.sinks + one.ring for one in windows(scheme).values())


def _parts(query: Tensor, segments: Segments, splits: int | None, form: Form | None) -> list[Part]:
    """Segments with the form they are read in, the cheapest if none is asked for, and the programs that share a
    sequence's tokens in each: `splits`, or as many as timing, or else the model, found worthwhile."""
    fixed, parts = splits is not None, list[Part]()
    for module, state, params, fold in segments:
        asked = query if fold is None else fold.query
        chosen = form or _form(module.plan, asked.shape[2], state, fixed=fixed)
        parts.append(Part(module, asked, state, params, fold=fold, form=chosen, fixed=fixed))
    dense = [part.form == "dense" for part in parts]
    if splits is not None:  # a fixed plan: what a sequence gets must not depend on who else is in the batch
        return [
            replace(part, clean=splits, edges=0 if once else splits) for part, once in zip(parts, dense, strict=True)
        ]
    found = parts[0].module.tuned(parts[0]) if len(parts) == 1 else None
    if found is not None:
        parts = [replace(part, depth=found.stages, times=found.warps // part.module.warps(KERNEL)) for part in parts]
    clean = [part.module._clean_splits(part) if found is None else part.most(found.splits) for part in parts]
    clean = within(clean, MOST_SPLITS)
    edges = [
        0 if once else part.module.edge_splits(part, few) for part, once, few in zip(parts, dense, clean, strict=True)
    ]
    edges = within(edges, MOST_EDGES)
    return [replace(part, clean=few, edges=more) for part, few, more in zip(parts, clean, edges, strict=True)]


def _form(plan: Plan, queries: int, state: AttentionState, *, fixed: bool) -> Form:
    """The cheapest form; of those that read pages where what a sequence gets must not depend on the batch."""
    counts = queries, state.packed_most, state.longest - state.packed_most, state.window
    return forms.form(plan, *counts, once=not fixed)
