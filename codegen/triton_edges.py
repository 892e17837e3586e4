"""The edges of a sequence in Triton: sinks, a first page that a window cuts, and all that follows the clean pages.

Tiles of both loops are dealt out to the programs of the edges in turn.  They mask, without branches, so that all loads
of a tile are asked for at once and a tile ahead.  Where both sides are packed as far, and read as in clean pages, the
first loop reads codes and the second exact rows; a tile in which the ones end and the others begin is visited by both,
each of which masks the other's tokens.  Else the first loop decodes of a mixed tile, number by number, what is packed
on either side, and takes exact rows for the rest.  That is three times the text, and what a kernel's text takes to be
read is a cost of short contexts; but such codes fill the registers in two loops, where one leaves some: of codes of
vectors numbers would be moved to memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .plan import Plan
from .text import fill, plus
from .triton_sides import KeySide, ValueSide

LOOPS = """
$lanes
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
        self.in_planes = tuple(self.at_once and side.in_planes for side in sides)

    def lines(
        self, addresses: list[str], seen: list[str], lanes: list[str], size: list[str], exact_query: list[str]
    ) -> list[str]:
        """Lines behind which the edges' outputs are summed.

        addresses     where a page's words and metadata begin
        seen          which rows see an edge tile's tokens, and which are there
        lanes         the lanes of both sides, where they are not known yet
        size          what makes of the query's size that of its scores
        exact_query   where the rows of the query itself are, if packed tokens meet another
        """
        plan, (keys, values) = self.plan, self.in_planes
        sinks, sink_tiles = plan.sinks, -(-plan.sinks // plan.edge_tile)
        sizes = {
            "tile": plan.edge_tile, "tile_less": plan.edge_tile - 1, "page": plan.layout.page_tokens,
            "sub": plan.layout.page_tokens // plan.edge_tile,
        }  # fmt: skip
        row = f"row = {f'tl.where(u < 0, u + {sinks}, {sinks} + {RING_ROW})' if sinks else RING_ROW}"
        fresh = f"fresh = {'(u >= packed_keys) | (u < 0)' if sinks else 'u >= packed_keys'}"
        packed = [*seen, "coded = u < packed_keys", "seen = seen & coded[:, None]"]
        exact = [*seen, fresh, "seen = seen & fresh[:, None]", "here = here & fresh"]
        exact_scores = [*self.keys.exact("here"), *["r = r * row_size[None, :]"] * (keys and self._apart)]
        text = fill(
            LOOPS,
            **sizes,
            lanes=lanes,
            exact_query=exact_query,
            prologue=[] if keys else [*self.keys.edge_prologue(), *size],
            accumulators=self.sides[1].prologue() if values else self.values.edge_prologue(),
            counts=fill(AT_ONCE_COUNTS if self.at_once else COUNTS, **sizes).splitlines(),
            mixed_seen=packed if self.at_once else [*seen, row],
            addresses=addresses,
            mixed=self._packed() if self.at_once else self._mixed(),
            exact_prologue=[
                *(self.sides[1].epilogue() + self.values.exact_prologue("mass") if values else []),
                *(self.keys.exact_prologue("true_size" if size else "size") if keys else []),
            ],
            sinks_behind=plus(sink_tiles),
            again=" - again" if self.at_once else "",
            sink_step=[f"tile = tl.where(step < tiles, tile, step - tiles - {sink_tiles})"] if sinks else [],
            seen=exact if self.at_once else seen,
            row=row,
            exact=[*exact_scores, *self.weights("r"), *self.values.exact("here")],
        )
        return text.splitlines()

    @property
    def _apart(self) -> bool:
        """Exact keys meet another query than packed ones, of a size of its own."""
        return self.keys.exact_rows is not None

    def _packed(self) -> list[str]:
        """The body of the loop over tiles that are packed on both sides as far."""
        keys, values = self.in_planes
        scores = self.sides[0].scores(0, "t") if keys else self.keys.decoded()
        sums = self.sides[1].accumulate(0, "t") if values else self.values.decoded()
        return [*scores, *self.weights("s"), *sums]

    def _mixed(self) -> list[str]:
        """The body of the loop over tiles of tokens that are decoded, exact, or not visible, on either side."""
        lines = ["coded = u < packed_keys", "exact = here & (u >= packed_keys)", *self.keys.either()]
        lines += [*self.weights("s"), "coded = u < packed_values", "exact = here & (u >= packed_values)"]
        return lines + self.values.either()
