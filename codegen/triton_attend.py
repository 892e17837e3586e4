"""Attention kernels in Triton: decode and extend (one skeleton), and raw scores.

Glossary of the attention skeleton (for maintainers; not emitted):
  bh, b, h      program's sequence and kv head; split: its share of the tokens; rows: query tokens x heads of the group
  u             token position counted from the first one after the sinks; a page holds PAGE of them, a tile TILE
  clean pages   visible to every row and packed on both sides: the main loop, no masks
  edge tiles    the first page when it is partly visible, everything from the last clean page on, and sinks, by one more
                program (or several), see `triton_edges`
  asked         position behind the last query's: the sequence's length, and more where newer tokens stand elsewhere
  size          power of two that a row of the query was divided by; scores and maxima are in its units
  turned        the query mapped into the space that keys are coded in; exact rows meet the query itself

Where tokens stand in any order (see `triton_places`) asked, last and oldest are positions, no page is clean for good,
and the main loop, over pages that are packed on both sides, masks.
"""

from __future__ import annotations

from functools import cached_property

from .overlap import overlapped
from .plan import Plan, SidePlan
from .text import Lines, fill, literal, plus
from .tiling import PAIR
from .triton_abreast import both_of, columns, row_index
from .triton_bands import FoldedKeys, FoldedValues
from .triton_edges import Edges
from .triton_meta import section
from .triton_names import abreast_name, kept_rows, pair_name, tokens_name
from .triton_partials import partials
from .triton_places import LOOSE, PLACES, base, of_tile, order, seen, stand_name
from .triton_shares import EARLY, Shares
from .triton_sides import KeySide, ValueSide
from .triton_strung import StrungKeys
from .triton_terms import keys_of, sections_of, values_of
from .triton_unmap import strung

LOG2E = 1.4426950408889634
ATTEND = """
@triton.jit(do_not_specialize=["queries", "table_width", "ring", "window", $loose, "splits", "edge_splits"])
def $name(
    $args
):
    ROWS: tl.constexpr = $rows
    bh = tl.program_id(0)
    split = tl.program_id(1)
    block = tl.program_id(2)
    b = bh // $heads
    h = bh % $heads
    packed_keys = tl.load(packed_keys_ptr + b)
    packed_values = tl.load(packed_values_ptr + b)
    length = tl.load(length_ptr + b)
    start = tl.load(start_ptr + b)
    first = tl.load(first_ptr + b)
    asked = $asked
    table = table_ptr + b.to(tl.int64) * table_width
    guess = tl.load(table + tl.minimum(split$per_page, table_width - 1))  # the first page, but where some are not read
    $in_front

    # which rows: (query token, head of the group)
    $row_index
    live = row_index < queries * $group
    token = row_index // $group
    head = (b * $q_heads + h * $group + row_index % $group).to(tl.int64)
    $places
    $query
    $columns_of
    peak = tl.full([ROWS], -1.0e30, tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    $query_rows

    $first_page
    $prologue

    if split < splits:
        $clean_prologue
        $accumulators
        $loop
            page = next_page.to(tl.int64)
            next_page = tl.load(table + $next)
            $addresses
            $clean
        $epilogue
        $clean_partials
    else:
        # edges: sinks, a partly visible first page, and all that follows the clean pages; decoded, or exact, by token
        key_rows = key_rows_ptr + bh.to(tl.int64) * $kept * $head_dim
        value_rows = value_rows_ptr + bh.to(tl.int64) * $kept * $value_dim
        $rows_see
        end = length$less_sinks
        $edges
        $edge_partials
"""

SCORES = """
@triton.jit(do_not_specialize=["queries", "table_width", "tokens"$loose])
def scores($args):
    ROWS: tl.constexpr = $rows
    bh = tl.program_id(0)
    tile = tl.program_id(1)
    block = tl.program_id(2)
    b = bh // $heads
    h = bh % $heads
    row_index = block * ROWS + tl.arange(0, ROWS)
    live = row_index < queries * $group
    token = row_index // $group
    head = (b * $q_heads + h * $group + row_index % $group).to(tl.int64)
    $query
    $lanes
    $prologue
    $places
    page = tl.load(table_ptr + b.to(tl.int64) * table_width + tile$per_page).to(tl.int64)
    $addresses
    out = out_ptr + ((head * queries + token) * tokens)[None, :]
    $halves
"""


class Attend:
    """Prints the kernels that read pages for a query."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.keys, self.values = sides_of(plan)
        self.pools = pools(plan)
        self.shares = Shares(plan, self.pools[0])

    @cached_property
    def edges(self) -> Edges:
        return Edges(self.plan, self.keys, self.values, sides_of(self.plan.at_edges), self._edge_weights)

    def _shared(self, rows: int) -> dict[str, int | str]:
        plan = self.plan
        sub = plan.page_tiles
        return {
            "rows": rows, "heads": plan.shape.kv_heads, "q_heads": str(plan.shape.q_heads), "group": plan.shape.group,
            "head_dim": plan.shape.head_dim, "value_dim": plan.values.channels,
            "less_sinks": plus(-plan.sinks), "plus_sinks": plus(plan.sinks), "kept": kept_rows(plan),
            "page": plan.layout.page_tokens,
            "page_less": plan.layout.page_tokens - 1, "tile": plan.tile, "tile_less": plan.tile - 1, "sub": sub,
            "per_page": f" // {sub}" if sub > 1 else "", "tiles": f" * {sub}" if sub > 1 else "",
        }  # fmt: skip

    def _front(self, bounds: list[str], *, waits: bool, ahead: bool) -> dict[str, list[str]]:
        """What a program does before it has the query, and between that and preparing it: which pages are its own, and
        which is first."""
        first = self.shares.first(bounds)
        if waits:  # all that does not depend on the query is done while another kernel maps it
            return {"in_front": [*first, *self.shares.fetch(), "await_last()"], "first_page": []}
        return {"in_front": ["all_asked_for()"], "first_page": [*first, *(self.shares.only() if ahead else [])]}

    def addresses(self, *, several: bool = True) -> list[str]:
        """Where the page's words and metadata of head h begin, if `several` also of those that are rotated with it, and
        which tokens of the page the tile holds."""
        plan, lines = self.plan, []
        sub = plan.page_tiles
        position = f"tile % {sub} * {plan.tile}" if sub > 1 else "0"
        lines.append(f"page_token = {position}")
        for half in range(plan.halves):
            shift = f" + {half * plan.half}" if half else ""
            lines.append(f"{tokens_name(plan, half)} = page_token{shift} + tl.arange(0, {plan.half})")
        lines += [line for half in plan.turns for line in both_of(plan, half)] if plan.abreast else []
        if any(term.layout.paired for term in plan.terms):
            for half in range(0, plan.halves, 2):
                shift = f" + {half // 2 * PAIR}" if half else ""
                lines.append(f"{pair_name(plan, half)} = page_token // 2{shift} + tl.arange(0, {PAIR})")
        return lines + self.sections(several=several)

    def sections(self, *, several: bool = True) -> list[str]:
        """Where the page's words, numbers and metadata of head h begin; `several` as for `addresses`."""
        plan, lines, layout = self.plan, [], self.plan.layout
        if any(term.layout.planar for term in plan.terms):
            lines.append(f"words = pool16_ptr + page * {layout.page_bytes // 2} + h * {layout.head_bytes // 2}")
        words = list(lines)
        for side in plan.terms:
            lines += self._numbers(side) if side.joined == 1 or not several else []
        for reader in [*self.keys.readers(), *self.values.terms]:
            if several and reader.head is not None:
                lines += reader.own([*words, *self._numbers(reader.side)])
        return lines

    def keys_of(self, addresses: list[str]) -> list[str]:
        """Of these lines those that the keys need."""
        others = tuple(name for term in self.plan.values.terms for name in (f"{term.letter}_", term.rows))
        return [line for line in addresses if not line.startswith(others)]

    def _numbers(self, side: SidePlan) -> list[str]:
        """Where the page's numbers, or its metadata, of one term of head h begin."""
        plan, layout, lines = self.plan, self.plan.layout, []
        if side.floats:
            size = 4 if side.floats == "fp32" else 2
            start = f"page * {layout.page_bytes // size} + h * {layout.head_bytes // size}"
            start += f" + {side.layout.float_offset // size}" if side.layout.float_offset else ""
            lines.append(f"{side.rows} = pool_{side.floats}_ptr + {start}")
        if side.layout.row:
            start = f"page * {layout.page_bytes} + h * {layout.head_bytes}{plus(side.layout.streams[0].offset)}"
            lines.append(f"{side.letter}_coded = pool8_ptr + {start}")
        lines += sections_of(plan, side)
        if side.layout.meta is not None:
            lines.append(f"{side.letter}_meta = {section(side, layout.page_bytes, layout.head_bytes)[1]}")
        return lines

    def clean(self) -> list[str]:
        """The main loop's body: scores, online softmax, weighted values; masks only where tokens stand in any order."""
        plan, lines, placed = self.plan, [], self.plan.shape.placed
        halves, several = plan.turns, len(plan.turns) > 1
        tokens = abreast_name if plan.abreast else tokens_name
        for half in halves:
            lines += of_tile(plan, half) if placed else []
            lines += self.keys.scores(half, tokens(plan, half))
            lines += self._capped("s")
            if placed:
                lines += [seen(f"seen{half}", stand_name(plan, half)), f"s = tl.where(seen{half}, s, -1.0e30)"]
            lines += [f"s{half}_all = s"] * several
        names = [f"s{half}_all" for half in halves] if several else ["s"]
        lines += self._softmax(names)
        for half, name in zip(halves, names, strict=True):
            p = f"tl.exp2({name} * size[None, :] - (peak * size)[None, :])"
            lines.append(f"p = tl.where(seen{half}, {p}, 0.0)" if placed else f"p = {p}")
            if several:  # numbers of one thread are summed first, and exchanged once a tile
                lines.append("weights = weights + p" if half else "weights = p")
            if half == halves[-1]:
                lines.append(f"mass = mass * decay + tl.sum({'weights' if several else 'p'}, 0)")
            lines += self.values.accumulate(half, tokens(plan, half))
        return lines

    def _softmax(self, names: list[str]) -> list[str]:
        top = names[0]
        for name in names[1:]:
            top = f"tl.maximum({top}, {name})"
        return [
            f"higher = tl.maximum(peak, tl.max({top}, 0))",
            "decay = tl.exp2((peak - higher) * size)",
            "peak = higher",
        ]

    def _capped(self, name: str) -> list[str]:
        if not self.plan.shape.softcap:
            return []
        return [f"{name} = softcap * tanh({name} * true_size[None, :] / softcap) * {literal(LOG2E)}"]

    def _edge_weights(self, scores: str) -> list[str]:
        """p = weights of an edge tile's tokens under these scores, 0 where a row does not see them."""
        lines = [*self._capped(scores), f"s = tl.where(seen, {scores}, -1.0e30)", *self._softmax(["s"])]
        lines.append("p = tl.where(seen, tl.exp2(s * size[None, :] - (peak * size)[None, :]), 0.0)")
        return [*lines, "mass = mass * decay + tl.sum(p, 0)"]

    def _query(self, name: str) -> list[str]:
        """Where the rows of the query, or of the turned query, begin."""
        dim = self.plan.keys.row if name == "turned" else self.plan.shape.head_dim
        return [f"{name} = {name}_ptr + ((head * queries + token) * {dim})[None, :]"]

    def attention(self, name: str, rows: int) -> str:
        """The text of `decode` or `extend`, whose products have so many columns, see `Plan.columns`."""
        plan = self.plan
        size = ["true_size = size", "size = tl.full([ROWS], 1.0, tl.float32)"] if plan.shape.softcap else []
        values = self.values
        lanes = [*self.keys.lane_lines(), *values.lane_lines()]
        loads, prologue = [*lanes, *self.keys.loads()], [*self.keys.prologue(), *size]
        alike, waits = self.edges.in_planes[0], overlapped(name, plan)
        ahead = alike and not waits and name == "decode"
        holes, bounds, seen = order(plan, self._shared(rows))
        itself = self.keys.exact_rows is not None or not plan.maps_query
        exact_query = self._query("query") if plan.maps_query and itself else []
        args = [*["query_ptr"] * itself, *self.keys.inputs(), *self.pools, "table_ptr", *parameters(plan)]
        args += ["packed_keys_ptr", "packed_values_ptr", "length_ptr", "start_ptr", "first_ptr"]
        args += ["key_rows_ptr", "value_rows_ptr", "partial_ptr"]
        placed = plan.shape.placed
        args += [*values.outputs(), "lse_ptr", "queries", "table_width", "ring", "window"]
        args += ["asked_ptr", *PLACES] if placed else ["ahead"]
        args += [
            "splits",
            "edge_splits",
            "scaling",
            *(["softcap"] if plan.shape.softcap else []),
            *([f"{EARLY}: tl.constexpr"] if ahead else []),
            "STAGES: tl.constexpr",
        ]
        return fill(
            ATTEND,
            name=name,
            **self._shared(rows),
            row_index=f"row_index = {row_index(plan.abreast)}",
            columns_of=columns() if plan.abreast else [],
            args=[f"{arg}," for arg in args],
            **self._front(bounds, waits=waits, ahead=ahead),
            query=self._query(self.keys.query),
            query_rows=loads if alike else [],
            prologue=prologue if alike else [],
            clean_prologue=[] if alike else [*loads, *prologue],
            accumulators=values.prologue(),
            **self.shares.loop(),
            addresses=self.addresses(),
            clean=self.clean(),
            **holes,
            epilogue=values.epilogue(),
            edges=self.edges.lines(self.sections(), seen, size, exact_query),
            clean_partials=partials(plan, values, edges=False),
            edge_partials=partials(plan, values, edges=True),
        )

    def scores(self, rows: int) -> str:
        """The text of `scores`."""
        plan, halves, placed = self.plan, Lines(), self.plan.shape.placed
        addresses = self.keys_of(self.addresses())
        for half in range(plan.halves):
            halves.extend(of_tile(plan, half, "u < tokens") if placed else [])
            halves.extend(self.keys.scores(half, tokens_name(plan, half)))
            shift = f" + {half * plan.half}" if half else ""
            halves.add(f"u = tile * {plan.tile}{shift} + tl.arange(0, {plan.half})")
            halves.add("tl.store(out + u[:, None], s * size[None, :], mask=live[None, :] & (u < tokens)[:, None])")
        text = "\n".join([*addresses, *halves.lines])
        args = [*([] if plan.maps_query else ["query_ptr"]), *self.keys.inputs()]
        args += [*(p for p in self.pools if p in text), "table_ptr"]
        args += [p for p in parameters(plan) if p.startswith("keys")]
        args += ["out_ptr", "queries", "table_width", "tokens", "scaling", *(PLACES if placed else [])]
        return fill(
            SCORES,
            **self._shared(rows),
            loose=LOOSE if placed else "",
            places=[base(plan)] if placed else [],
            args=", ".join(args),
            query=self._query(self.keys.query),
            lanes=self.keys.lane_lines(),
            prologue=[*self.keys.loads(), *self.keys.prologue()],
            addresses=addresses,
            halves=halves.lines,
        )


def parameters(plan: Plan) -> list[str]:
    """Pointers to what comes with the parameters: calibrated scales, second levels, tables."""
    found = []
    for side in (plan.keys, plan.values):  # what is left has none
        found += [f"{side.name}_scale_ptr"] if side.static else []
        found += [f"{side.name}_second_ptr"] if side.second is not None else []
        found += [f"{side.name}_table_ptr"] if side.alphabet.fitted else []
    return found


def pools(plan: Plan) -> list[str]:
    """The pool, once for every element type that is read from it."""
    names = set()
    for side in plan.terms:
        floats = "fp16" if side.factors or side.slots or side.beside and not side.beside.below else side.floats
        names |= {"pool8_ptr"} if side.slots or side.chosen or side.layout.row else set()
        names |= set() if side.layout.row else {f"pool_{floats}_ptr" if floats else "pool16_ptr"}
        names |= {"pool_fp16_ptr"} if side.layout.across else set()
        if side.layout.meta is not None:
            names.add(f"pool{8 * side.layout.meta.element}_ptr")
    return sorted(names)


def sides_of(plan: Plan) -> tuple[KeySide, ValueSide]:
    """What reads keys and values of a plan's tiles."""
    alone = (term for term in plan.keys.terms if not (term.masked and term.store.gathers))  # else read with another
    keys = [keys_of(plan, term, head) for term in alone for head in term.heads]
    keys = [FoldedKeys(plan, plan.keys)] if plan.keys.polar and plan.keys.band else keys
    keys = [StrungKeys(plan, plan.keys)] if strung(plan.keys) else keys
    values = [values_of(plan, term, head) for term in plan.values.terms for head in term.heads]
    values = [FoldedValues(plan, plan.values)] if plan.values.polar and plan.values.band else values
    return KeySide(plan, keys), ValueSide(plan, values)
