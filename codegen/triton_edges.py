"""The edges of a sequence in Triton: sinks, a first page that a window cuts, and all that follows the clean pages.

Tiles of both loops are dealt out to the programs of the edges in turn.  They mask, without branches, so that all loads
of a tile are asked for at once and a tile ahead.  Where both sides are packed as far, and read as in clean pages, the
first loop reads codes and the second exact rows; a tile in which the ones end and the others begin is visited by both,
each of which masks the other's tokens.  Else the first loop takes of a mixed tile what is packed on either side, and
exact rows for the rest.

Where codes of a side cannot be read as in clean pages, those of both are decoded, number by number, and so are mixed
tiles of two streams of codes, whose sums would stand beside those of exact rows.  That is three times the text, and
what a kernel's text takes to be read is a cost of short contexts; but in two loops such codes fill the registers: of
codes of vectors numbers would be moved to memory.  With the keys' planes beside decoded values a processor of an H200
held 8 programs of `channel4`, and not 12: 16 x 8 x 16384 took 93 us, and not 86.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .plan import Plan
from .text import fill, plus
from .triton_sides import KeySide, ValueSide

LOOPS = """
$loads
$exact_query
$prologue
$accumulators
before = (low - edge) * $sub
$counts
for step in tl.range(split - splits, mixed, edge_splits, num_stages=2):
    tile = tl.where(step < before, edge * $sub + step, high * $sub + step - before)
    u = tile * $tile + tl.arange(0, $tile)
    page = tl.load(table + tile * $tile // $page).to(tl.int64)
    t = u % $page
    page_token = tile * $tile % $page
    $mixed_seen
    $addresses
    $mixed
$exact_prologue
# tiles of exact rows alone, those of sinks behind the others
done = (tl.maximum(mixed - split + splits, 0) + edge_splits - 1) // edge_splits * edge_splits
for step in tl.range(split - splits + done, tiles$sinks_behind, edge_splits, num_stages=2):
    tile = high * $sub + step - before$again
    $sink_step
    u = tile * $tile + tl.arange(0, $tile)
    $seen
    $row
    $exact
"""

COUNTS = """
packed = tl.maximum(packed_keys, packed_values)
mixed = before + (tl.maximum(packed - high * $page, 0) + $tile_less) // $tile
tiles = before + (tl.maximum(end - high * $page, 0) + $tile_less) // $tile
"""

# Both loops visit a tile that is packed in part.
AT_ONCE_COUNTS = """
mixed = before + (tl.maximum(packed_keys - high * $page, 0) + $tile_less) // $tile
again = ((end > packed_keys) & (packed_keys > high * $page) & (packed_keys % $tile > 0)).to(tl.int32)
tiles = before + (tl.maximum(end - high * $page, 0) + $tile_less) // $tile + again
"""

RING_ROW = "(u - first) % ring"  # of the exact rows behind the sinks

Weights = Callable[[str], Sequence[str]]
"""The name of an edge tile's scores -> lines that make p of them, the weights of its tokens."""


class Edges:
    """Prints what the programs of the edges do; `sides` read tiles that are packed in part as those of clean pages."""

    def __init__(
        self, plan: Plan, keys: KeySide, values: ValueSide, sides: tuple[KeySide, ValueSide], weights: Weights
    ) -> None:
        self.plan, self.keys, self.values, self.weights = plan, keys, values, weights
        self.sides = sides
        self.at_once = plan.at_once and all(side.in_planes or side.side.floats for side in sides)
        single = all(len(term.operands) == 1 for term in plan.terms)
        alike = self.at_once or single and all(side.in_planes for side in sides)
        self.in_planes = tuple(alike and side.in_planes for side in sides)

    def lines(self, addresses: list[str], seen: list[str], size: list[str], exact_query: list[str]) -> list[str]:
        """Lines behind which the edges' outputs are summed.

        addresses     where a page's words and metadata begin
        seen          which rows see an edge tile's tokens, and which are there
        size          what makes of the query's size that of its scores
        exact_query   where the rows of the query itself are, if packed tokens meet another
        """
        plan, sinks = self.plan, self.plan.sinks
        sink_tiles = -(-sinks // plan.edge_tile)
        sizes = {
            "tile": plan.edge_tile, "tile_less": plan.edge_tile - 1, "page": plan.layout.page_tokens,
            "sub": plan.layout.page_tokens // plan.edge_tile,
        }  # fmt: skip
        row = f"row = {f'tl.where(u < 0, u + {sinks}, {sinks} + {RING_ROW})' if sinks else RING_ROW}"
        fresh = f"fresh = {'(u >= packed_keys) | (u < 0)' if sinks else 'u >= packed_keys'}"
        packed = [*seen, "coded = u < packed_keys", "seen = seen & coded[:, None]"]
        exact = [*seen, fresh, "seen = seen & fresh[:, None]", "here = here & fresh"]
        true_size = "true_size" if size else "size"
        loads, decoded_query = list[str](), list[str]()
        if not self.in_planes[0]:  # else both branches have them
            loads = [*self.keys.lane_lines(), *self.values.lane_lines(), *self.keys.loads()]
            decoded_query = [*self.keys.edge_prologue(), *size]
        text = fill(
            LOOPS,
            **sizes,
            loads=loads,
            exact_query=exact_query,
            prologue=[*decoded_query, *self._operands(true_size, at_once=False)],
            accumulators=self._accumulators(),
            counts=fill(AT_ONCE_COUNTS if self.at_once else COUNTS, **sizes).splitlines(),
            mixed_seen=packed if self.at_once else [*seen, row],
            addresses=addresses,
            mixed=self._packed() if self.at_once else self._mixed(),
            exact_prologue=[*self._ended(), *self._operands(true_size, at_once=True)],
            sinks_behind=plus(sink_tiles),
            again=" - again" if self.at_once else "",
            sink_step=[f"tile = tl.where(step < tiles, tile, step - tiles - {sink_tiles})"] if sinks else [],
            seen=exact if self.at_once else seen,
            row=row,
            exact=[*self._exact_scores("here"), *self.weights("r"), *self.values.exact("here")],
        )
        return text.splitlines()

    # ---- before, between and behind the loops --------------------------------------------------------------------

    def _operands(self, size: str, *, at_once: bool) -> list[str]:
        """What exact keys meet, where packed ones meet the query that was prepared for clean pages: made between the
        loops if both sides are packed at once, else before both."""
        if not self.in_planes[0] or at_once != self.at_once:
            return []
        return self.keys.exact_prologue(size) if at_once else self.keys.mixed_prologue(size)

    def _accumulators(self) -> list[str]:
        """The sums of the first loop."""
        if not self.in_planes[1]:
            return self.values.edge_prologue()
        return self.sides[1].prologue() if self.at_once else self.values.mixed_prologue(self.sides[1])

    def _ended(self) -> list[str]:
        """Lines that make outputs of sums over planes, behind the first loop, and sums of exact rows where there were
        none before."""
        if not self.in_planes[1]:
            return []
        if self.at_once:
            return self.sides[1].epilogue() + self.values.exact_prologue("mass")
        return self.values.mixed_epilogue(self.sides[1])

    # ---- the loops -----------------------------------------------------------------------------------------------

    def _packed(self) -> list[str]:
        """The body of the loop over tiles that are packed on both sides as far."""
        sums = self.sides[1].accumulate(0, "t") if self.in_planes[1] else self.values.decoded()
        return [*self._coded_scores(), *self.weights("s"), *sums]

    def _mixed(self) -> list[str]:
        """The body of the loop over tiles of tokens that are packed, exact, or not visible, on either side."""
        lines = ["coded = u < packed_keys", "exact = here & (u >= packed_keys)"]
        lines += [*self._coded_scores(), *self._exact_scores("exact"), "s = tl.where(coded[:, None], s, r)"]
        lines += [*self.weights("s"), "coded = u < packed_values", "exact = here & (u >= packed_values)"]
        return lines + (self.values.either_in_planes(self.sides[1]) if self.in_planes[1] else self.values.either())

    def _coded_scores(self) -> list[str]:
        """s = scores of packed tokens."""
        return self.sides[0].scores(0, "t") if self.in_planes[0] else self.keys.decoded()

    def _exact_scores(self, there: str) -> list[str]:
        """r = scores of exact rows, in units of the size of what packed tokens meet."""
        apart = self.in_planes[0] and self.keys.exact_rows is not None  # they meet another query, of another size
        return [*self.keys.exact(there), *["r = r * row_size[None, :]"] * apart]
