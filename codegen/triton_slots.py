"""Single numbers that are kept as they are, in Triton: x[t, d] = sum_i n[i] where slot i stands at (t, d).

Of keys every token has its slots, and the query is gathered: a score is sum_i n[t, i] q[place[t, i]].  Behind rotary
positions the query a quarter turn on is, too, and both meet the wave of the token's position.  Of values every channel
of 64 tokens has its slots, and the weights are gathered: an output is sum_i n[i, d] p[place[i, d]].  No number of a
token that has no slot is made.
"""

from __future__ import annotations

from kvdsl.codes import SLOT_TOKENS
from kvdsl.scheme import PreRope

from .plan import SidePlan
from .sections import Slots
from .text import plus
from .triton_gather import where_gathered
from .triton_keys import Keys
from .triton_places import stand_name
from .triton_planes import Planes
from .triton_rope import pair
from .triton_values import Values


def held_by(side: SidePlan) -> Slots:
    """Where a term's single numbers stand."""
    assert side.slots is not None
    return side.slots


class Slotted(Planes):
    """Loading slots."""

    @property
    def held(self) -> Slots:
        return held_by(self.side)

    def slot(self, index: str, mask: str) -> list[str]:
        """Lines that load what stands in slots, float32, and where."""
        p, known = self.prefix, f", mask={mask}, other=0" if mask else ""
        return [
            f"{p}_number = tl.load({p}_numbers + {index}{known}).to(tl.float32)",
            f"{p}_place = tl.load({p}_places + {index}{known}).to(tl.int32)",
        ]

    def of_tokens(self, slot: int, tokens: str) -> list[str]:
        """A slot of the keys of these tokens of the page."""
        return self.slot(f"{tokens}{plus(slot * self.held.width)}", "")

    def of_channels(self, slot: int, plane: int, block: str) -> list[str]:
        """A slot of a plane of the values of a block."""
        parts = [f"{block} * {self.held.count * self.held.width}"] if block != "0" else []
        parts += [str(slot * self.held.width)] if slot else []
        return self.slot(" + ".join([*parts, self.plane_lane(plane)]), self.inside(plane))

    @property
    def blocks(self) -> int:
        """Blocks of tokens of a page."""
        return self.plan.layout.page_tokens // SLOT_TOKENS

    def block(self, half: int) -> str:
        """The block, within its page, of a tile."""
        return "0" if self.blocks == 1 else f"(page_token // {SLOT_TOKENS})"


class SlottedKeys(Slotted, Keys):
    """Scores of single numbers of keys: products in float32."""

    def lane_lines(self) -> list[str]:
        """The line that says where the query's numbers begin, channel by channel: a number of all rows is one read."""
        if self.side.rope is None:
            return [where_gathered(self.plan)]
        # rows that are not there read those of the first: a mask of each load is kept through the loop
        size = 2 * self.plan.shape.head_dim * self.plan.shape.group
        start = f"gathered = gathered_ptr + bh.to(tl.int64) * queries * {size}"
        return [start, f"{self.prefix}_rows = tl.where(live, row_index, 0)[None, :]"]

    def loads(self, query: str) -> list[str]:
        return []

    def rows(self) -> list[str]:
        return []

    def operands(self) -> list[str]:
        return []

    def prepared(self) -> list[str]:
        return []

    def _scores(self, half: int, tokens: str) -> list[str]:
        if self.plan.shape.placed:
            return self._met_by(tokens, stand_name(self.plan, half))
        first = f"tile * {self.plan.tile}{plus(half * self.plan.half)}"
        return self._met_by(tokens, f"{first} + tl.arange(0, {self.plan.half})")

    def tokens(self) -> list[str]:
        return self.own(self._met_by("t", f"tl.where(coded, {'stand' if self.plan.shape.placed else 'u'}, 0)"))

    def _met_by(self, tokens: str, u: str) -> list[str]:
        """The query's numbers at the places of `tokens` of the page, those at u, or at these positions, each times what
        stands there."""
        p, dim, rope, lines = self.prefix, self.plan.shape.head_dim, self.side.rope, list[str]()
        if rope is not None:
            before = 0 if self.plan.shape.placed else self.plan.sinks
            lines.append(f"{p}_wave = ({u}{plus(before)}) * {dim}")
        for i in range(self.held.count):
            lines += self.of_tokens(i, tokens)
            place = f"tl.minimum({p}_place, {dim - 1})"  # of a token that was never packed it is any
            lines += self._query(place) if rope is None else self._turned_query(place, rope)
            product = f"{p}_number[:, None] * {p}_met"
            lines.append(f"s = s + {product}" if i else f"s = {product}")
        return [*lines, "s = s * (scaling * inverse)[None, :]"]

    def _query(self, place: str) -> list[str]:
        """Lines that gather the query at the places."""
        p, group = self.prefix, self.plan.shape.group
        return [
            f"{p}_place = {place} * (queries * {group})",
            f"{p}_met = tl.load(gathered + {p}_place[:, None], mask=live[None, :], other=0.0)",
        ]

    def _turned_query(self, place: str, rope: PreRope) -> list[str]:
        """The same of the query turned back by each token's position: R_t e_m . q for the channel m of a place."""
        p, dim, group = self.prefix, self.plan.shape.head_dim, self.plan.shape.group
        return [
            f"{p}_place = {place}",
            f"{p}_pair = {pair(rope, f'{p}_place', 0, dim)}",
            f"{p}_wave_at = rope_ptr + ({p}_wave + {p}_pair)",
            f"{p}_cosine = tl.load({p}_wave_at)",
            f"{p}_sine = tl.load({p}_wave_at{plus(dim // 2)})",
            f"{p}_place = {p}_place * (queries * {2 * group})",
            f"{p}_met = tl.load(gathered + ({p}_place[:, None] + {p}_rows))",
            f"{p}_turned = tl.load(gathered + ({p}_place + queries * {group})[:, None] + {p}_rows)",
            f"{p}_met = {p}_met * {p}_cosine[:, None] + {p}_turned * {p}_sine[:, None]",
        ]


class SlottedValues(Slotted, Values):
    """Sums of single numbers of values under their weights, in float32."""

    @property
    def in_planes(self) -> bool:
        return False

    def _accumulate(self, half: int, tokens: str) -> list[str]:
        lines = [f"{name} = {name} * decay[None, :]" for name in self.accumulators()] if half == 0 else []
        first, size = str(half * self.plan.half), self.plan.half
        if self.plan.tile < SLOT_TOKENS:
            first = f"page_token % {SLOT_TOKENS}"
        return lines + self._add("p", self.block(half), first, size)

    def tokens(self) -> list[str]:
        p, edge = self.prefix, self.plan.edge_tile
        lines = [f"{p}_weight = tl.where(coded[:, None], p, 0.0)"]
        lines.append(f"{p}_first = tl.maximum(tile, 0) * {edge} % {self.plan.layout.page_tokens}")
        block = "0" if self.blocks == 1 else f"({p}_first // {SLOT_TOKENS})"
        first = f"{p}_first" if self.blocks == 1 else f"{p}_first % {SLOT_TOKENS}"
        return self.own([*lines, *self._add(f"{p}_weight", block, first, edge)])

    def _add(self, weight: str, block: str, first: str, size: int) -> list[str]:
        """What stands in the slots of `size` tokens from `first` of the block on, under their weights."""
        p, lines = self.prefix, list[str]()
        for i in range(self.held.count):
            for j in range(self.side.layout.planes):
                lines += self.of_channels(i, j, block)
                if size < SLOT_TOKENS:
                    lines += [f"{p}_place = {p}_place - {first}"] * (first != "0")
                    lines.append(f"{p}_here = ({p}_place >= 0) & ({p}_place < {size})")
                    lines.append(f"{p}_number = tl.where({p}_here, {p}_number, 0.0)")
                    lines.append(f"{p}_place = tl.where({p}_here, {p}_place, 0)")
                else:
                    lines.append(f"{p}_place = {p}_place & {SLOT_TOKENS - 1}")
                lines.append(f"{p}_index = tl.broadcast_to({p}_place[:, None], [{self.lanes}, ROWS])")
                lines.append(f"o{j} = o{j} + {p}_number[:, None] * tl.gather({weight}, {p}_index, 0)")
        return lines
