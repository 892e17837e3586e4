"""The attention that tokens receive, in Triton: log-sum-exps of query rows, and sums of their weights token by token.

No weight is kept: `reach` passes over the tokens of each block of query rows, `received` over the query rows of each
tile of tokens.  Both read a token by the same lines, so that weights are of the scores that their sums are of: pages
that are packed throughout as `scores` does, everything else as the edges of attention.

Glossary of both skeletons (for maintainers; not emitted), beside that of `triton_attend`:
  pages         pages that are packed throughout
  position      the token that a query row stands at, from the first of its sequence; -1 of rows that do not count
  last, oldest  the first and the last u that a row sees, or positions, where tokens stand in any order
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cached_property

from .plan import Plan
from .text import fill, literal, plus
from .triton_attend import LOG2E, Attend, parameters
from .triton_edges import RING_ROW
from .triton_masked import MaskedKeys
from .triton_names import tokens_name
from .triton_places import LOOSE, PLACES, base, of_tile, seen, stand_name

Then = Callable[[int], list[str]]
"""What is done with the scores of a sub-tile, by its number."""

ROWS = """
row_index = block * ROWS + tl.arange(0, ROWS)
live = row_index < queries * $group
token = row_index // $group
head = (b * $q_heads + h * $group + row_index % $group).to(tl.int64)
position = tl.load(position_ptr + b.to(tl.int64) * queries + token, mask=live, other=-1)
$last
"""

REACH = """
@triton.jit(do_not_specialize=["queries", "table_width", "ring", "splits", "edge_splits"$loose])
def reach(
    $args
):
    ROWS: tl.constexpr = $rows
    bh = tl.program_id(0)
    split = tl.program_id(1)
    block = tl.program_id(2)
    $sequence
    $query_rows
    $query
    newest = tl.max(last, 0)
    peak = tl.full([ROWS], -1.0e30, tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    if split < splits:
        $lanes
        $prologue
        $bounds
        share = (high - low + splits - 1) // splits
        begin = tl.minimum(low + split * share, high)
        stop = tl.minimum(begin + share, high)
        for tile in tl.range(begin$tiles, stop$tiles, num_stages=1):
            page = tl.load(table + tile$per_page).to(tl.int64)
            $addresses
            $clean
        $store
    else:
        $rows_of_keys
        $lanes
        $edge_prologue
        $edge_bounds
        for step in tl.range(split - splits, $sink_tiles + count, edge_splits, num_stages=1):
            tile = $edge_index
            $edge_tokens
            $edges
        $store
"""

RECEIVED = """
@triton.jit(do_not_specialize=["queries", "table_width", "ring", "tiles", "longest"$loose])
def received(
    $args
):
    ROWS: tl.constexpr = $rows
    bh = tl.program_id(0)
    step = tl.program_id(1)
    $sequence
    blocks = (queries * $group + ROWS - 1) // ROWS
    out = bh.to(tl.int64) * longest$plus_sinks
    if step < tiles:
        tile = step
        if tile < pages$tiles:
            $fixed_lanes
            page = tl.load(table + tile$per_page).to(tl.int64)
            $addresses
            $sums
            for block in tl.range(0, blocks, num_stages=1):
                $query_rows
                $counted
                if tl.max(last, 0) >= $tile_begin:
                    $query
                    $row_lanes
                    $prologue
                    $clean
            $stores
    else:
        $rows_of_keys
        step = step - tiles
        before = pages * $edge_sub
        tile = $edge_index
        if tile * $edge_tile < end:
            $fixed_lanes
            $edge_tokens
            $edge_sums
            for block in tl.range(0, blocks, num_stages=1):
                $query_rows
                $counted
                if tl.max(last, 0) >= $edge_begin:
                    $query
                    $row_lanes
                    $edge_prologue
                    $edges
            $edge_stores
"""

SEQUENCE = """
b = bh // $heads
h = bh % $heads
packed_keys = tl.load(packed_keys_ptr + b)
length = tl.load(length_ptr + b)
$begin
table = table_ptr + b.to(tl.int64) * table_width
pages = packed_keys // $page
"""

# Beside what attention knows of its edges: the address of the exact rows, and one tile of tokens.
KEY_ROWS = """
first = tl.load(first_ptr + b)
key_rows = key_rows_ptr + bh.to(tl.int64) * $kept * $head_dim
end = length$less_sinks
"""

EDGE_TOKENS = """
u = tile * $edge_tile + tl.arange(0, $edge_tile)
in_pages = (tile >= 0) & (tile * $edge_tile < packed_keys)
page = tl.load(table + tile // $edge_sub, mask=in_pages, other=0).to(tl.int64)
t = tl.maximum(u, 0) % $page
here = (u >= $minus_sinks) & (u < end)
$stands
row = $row
$edge_addresses
coded = (u >= 0) & (u < packed_keys)
exact = here & ((u < 0) | (u >= packed_keys))
"""

# A row whose log-sum-exp is -inf sees nothing, as one that stands nowhere.
COUNTED = """
lse = tl.load(lse_ptr + head * queries + token, mask=live, other=0.0)
last = tl.where(lse != float("-inf"), last, $nowhere)
lse = lse * $log2e
"""

BOUNDS = """
low = tl.maximum(oldest, 0) // $page
high = tl.maximum(tl.minimum(pages, (tl.maximum(newest, -1) + $page) // $page), low)
"""

EDGE_BOUNDS = """
before = tl.maximum(pages * $edge_sub, tl.maximum(oldest, 0) // $edge_tile)
count = tl.maximum((tl.minimum(end, newest + 1) + $edge_tile_less) // $edge_tile - before, 0)
"""

# The same where tokens stand in any order; `oldest` is of the row then, too.
PLACED = """
low = 0
high = pages
"""

PLACED_EDGES = """
before = pages * $edge_sub
count = tl.maximum((end + $edge_tile_less) // $edge_tile - before, 0)
"""

PLACED_ROWS = ("last = position  # [rows]", "oldest = tl.maximum(visible, last - window + 1)  # [rows]")

STORE = """
lse = (peak * size + tl.log2(tl.where(mass == 0.0, 1.0, mass))) * 0.6931471805599453
where = split.to(tl.int64) * tl.num_programs(0) * $group * queries + head * queries + token
tl.store(out_ptr + where, tl.where(mass == 0.0, float("-inf"), lse), mask=live)
"""


class Received(Attend):
    """Prints `reach` and `received`, of whose sums beside scores the registers are full."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        for term in self.keys.terms:
            if isinstance(term, MaskedKeys):
                term.in_twos = False

    def texts(self) -> list[str]:
        """The texts of both kernels."""
        return [
            fill(
                REACH, **self._parts, args=self._arguments("splits", "edge_splits", "out_ptr"),
                store=fill(STORE, group=self.plan.shape.group).splitlines(), clean=self._clean(self._reached),
                edges=self._edges(self._reached),
            ),
            fill(
                RECEIVED, **self._parts, args=self._arguments("tiles", "longest", "lse_ptr", "sum_ptr", "square_ptr"),
                counted=fill(COUNTED, log2e=literal(LOG2E), nowhere=self._nowhere).splitlines(),
                clean=self._clean(self._added), edges=self._edges(self._added),
                **self._sums(),
            ),
        ]  # fmt: skip

    # ---- what both have -------------------------------------------------------------------------------------------

    @cached_property
    def _scores(self) -> list[list[str]]:
        """Lines that score each sub-tile of packed tokens."""
        return [self.keys.scores(half, tokens_name(self.plan, half)) for half in range(self.plan.halves)]

    @cached_property
    def _either(self) -> list[str]:
        """Lines that score edge tokens."""
        start = f"s = tl.zeros([{self.plan.edge_tile}, ROWS], tl.float32)"
        rows = [*self.keys.exact("exact"), "s = tl.where(coded[:, None], s, r)"]
        return [start, *self._where_any("coded", self.keys.decoded()), *self._where_any("exact", rows)]

    def _where_any(self, tokens: str, lines: list[str]) -> list[str]:
        """Lines that a tile without any of these tokens ("coded", "exact") leaves out.  Not of radii and angles:
        branches keep apart what fills the registers one by one, but two planes at once fill them in any of them."""
        if any(term.polar for term in self.plan.terms):
            return lines
        return [f"if tl.max({tokens}.to(tl.int32), 0) > 0:", *(f"    {line}" for line in lines)]

    @property
    def _nowhere(self) -> int:
        """What `last` is of a row that sees nothing."""
        return -1 if self.plan.shape.placed else -1 - self.plan.sinks

    def _itself(self) -> bool:
        """Whether exact rows meet the query itself."""
        return self.keys.exact_rows is not None or not self.plan.maps_query

    def _row(self) -> str:
        """As in attention; a remainder says that the row of a sink is small, whatever the program's number."""
        sinks = self.plan.sinks
        return f"tl.where(u < 0, (u + {sinks}) % {sinks}, {sinks} + (u - first) % ring)" if sinks else RING_ROW

    def _arguments(self, *last: str) -> list[str]:
        plan = self.plan
        scores = (line for lines in (*self._scores, self._either) for line in lines)
        read = "\n".join([*self.keys_of(self.addresses()), *scores])
        args = [*["query_ptr"] * self._itself(), *self.keys.inputs(), *(p for p in self.pools if p in read)]
        args += ["table_ptr", *(p for p in parameters(plan) if p.startswith("keys"))]
        args += ["packed_keys_ptr", "length_ptr", "start_ptr", "first_ptr", "key_rows_ptr", "position_ptr"]
        args += [*(["window", *PLACES] if plan.shape.placed else []), "queries", "table_width", "ring"]
        args += [*last, "scaling", *["softcap"] * plan.shape.softcap]
        return [f"{arg}," for arg in args]

    @cached_property
    def _parts(self) -> dict[str, list[str] | str | int]:
        """Holes of either skeleton."""
        plan, sinks, edge_tile = self.plan, self.plan.sinks, self.plan.edge_tile
        shared = self._shared(plan.rows(many=True))
        shared |= {
            "edge_tile": edge_tile, "edge_tile_less": edge_tile - 1, "edge_sub": plan.layout.page_tokens // edge_tile,
            "sink_tiles": -(-sinks // edge_tile), "minus_sinks": -sinks, "row": self._row(),
        }  # fmt: skip
        size = ["true_size = size", "size = tl.full([ROWS], 1.0, tl.float32)"] if plan.shape.softcap else []
        itself = self._query("query") if plan.maps_query and self._itself() else []
        before, index = shared["sink_tiles"], "before + step"
        index = f"tl.where(step < {before}, step - {before}, before + step - {before})" if sinks else index
        order = self._order(shared)
        tokens = fill(EDGE_TOKENS, **shared, **order, edge_addresses=self.keys_of(self.sections())).splitlines()
        lanes = self.keys.lane_lines()
        moved = of_rows(lanes)
        return {
            **shared, **order, "edge_index": index, "sequence": fill(SEQUENCE, **shared, **order).splitlines(),
            "query_rows": fill(ROWS, **shared, **order).splitlines(), "query": [*self._query(self.keys.query), *itself],
            "lanes": lanes, "row_lanes": moved, "fixed_lanes": [line for line in lanes if line not in moved],
            "prologue": [*self.keys.loads(), *self.keys.prologue(), *size],
            "edge_prologue": [*self.keys.loads(), *self.keys.edge_prologue(), *size],
            "addresses": self.keys_of(self.addresses()), "rows_of_keys": fill(KEY_ROWS, **shared).splitlines(),
            "edge_tokens": tokens,
        }  # fmt: skip

    def _order(self, shared: dict[str, int | str]) -> dict[str, list[str] | str | int]:
        """What follows from the order of tokens, or, where they have none, is done with all of them."""
        plan, placed = self.plan, self.plan.shape.placed
        bounds, edge_bounds = (PLACED, PLACED_EDGES) if placed else (BOUNDS, EDGE_BOUNDS)
        last = f"last = tl.minimum(position, length - 1){plus(-plan.sinks)}  # [rows]"
        start = "tl.maximum(tl.load(start_ptr + b), 0)"
        return {
            "bounds": fill(bounds, **shared).splitlines(), "edge_bounds": fill(edge_bounds, **shared).splitlines(),
            "last": [*PLACED_ROWS] if placed else [last], 
            "begin": [f"visible = {start}", base(plan)] if placed else [f"oldest = {start}{plus(-plan.sinks)}"],
            "loose": f', "window"{LOOSE}' if placed else "",
            "stands": ["stand = tl.load(places + u, mask=here, other=0) + origin"] if placed else [],
            "tile_begin": 0 if placed else f"tile * {plan.tile}",
            "edge_begin": 0 if placed else f"tile * {plan.edge_tile}",
        }  # fmt: skip

    def _seen(self, half: int | None) -> str:
        """The line that says which rows see the tokens of a sub-tile, or of an edge tile."""
        if not self.plan.shape.placed:
            return "seen = (u[:, None] <= last[None, :]) & (u >= oldest)[:, None]"
        line = seen("seen", "stand" if half is None else stand_name(self.plan, half))
        return line if half is not None else f"{line} & here[:, None]"

    def _clean(self, then: Then) -> list[str]:
        """Lines that score a tile of packed tokens, and go on with each of its sub-tiles."""
        plan, lines = self.plan, []
        for half in range(plan.halves):
            lines += of_tile(plan, half) if plan.shape.placed else []
            lines += [*self._scores[half], *self._capped("s")]
            shift = f" + {half * plan.half}" if half else ""
            if not plan.shape.placed:
                lines.append(f"u = tile * {plan.tile}{shift} + tl.arange(0, {plan.half})")
            lines += [self._seen(half), *then(half)]
        return lines

    def _edges(self, then: Then) -> list[str]:
        """The same of a tile of edge tokens."""
        return [*self._either, *self._capped("s"), self._seen(None), *then(0)]

    # ---- what each does with scores -------------------------------------------------------------------------------

    def _reached(self, half: int) -> list[str]:
        """Add a sub-tile to the sums of `reach`."""
        return [
            "s = tl.where(seen, s, -1.0e30)",
            *self._softmax(["s"]),
            'p = tl.exp2(tl.where(seen, s * size[None, :] - (peak * size)[None, :], float("-inf")))',
            "mass = mass * decay + tl.sum(p, 0)",
        ]

    def _added(self, half: int) -> list[str]:
        """Add the weights of a block of rows to the sums of a sub-tile's tokens."""
        return [
            'p = tl.exp2(tl.where(seen, s * size[None, :] - lse[None, :], float("-inf")))',
            f"sum{half} = sum{half} + tl.sum(p, 1)",
            f"square{half} = square{half} + tl.sum(p * p, 1)",
        ]

    def _sums(self) -> dict[str, list[str]]:
        """The sums of `received`, and where they go: of the tokens of a tile, and of an edge tile."""
        plan = self.plan
        starts, stores = [], []
        for half in range(plan.halves):
            starts += [f"{name}{half} = tl.zeros([{plan.half}], tl.float32)" for name in ("sum", "square")]
            shift = f" + {half * plan.half}" if half else ""
            stores.append(f"u = tile * {plan.tile}{shift} + tl.arange(0, {plan.half})")
            stores += [f"tl.store({name}_ptr + out + u, {name}{half})" for name in ("sum", "square")]
        edge_starts = [f"{name}0 = tl.zeros([{plan.edge_tile}], tl.float32)" for name in ("sum", "square")]
        edge_stores = [f"tl.store({name}_ptr + out + u, {name}0, mask=here)" for name in ("sum", "square")]
        return {"sums": starts, "stores": stores, "edge_sums": edge_starts, "edge_stores": edge_stores}


def of_rows(lines: list[str]) -> list[str]:
    """Those of the lines that depend on which query rows a block has."""
    known, found = {"row_index", "live", "token", "head"}, []
    for line in lines:
        target, _, value = line.partition(" = ")
        if known & set(re.findall(r"\w+", value)):
            found.append(line)
            known.add(target)
    return found
