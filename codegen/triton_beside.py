"""Numbers of channels that are chosen anew every few tokens, beside codes of all channels, in Triton.

A score is sum_i n[t, i] q[m[i]] over the chosen channels m of the tokens' block: the query is gathered there once a
tile.  Of codes with more bits than the others' n is what stands above their lowest bits, and q[m[i]] is multiplied by
the channel's scale, which stands among those of all channels.
"""

from __future__ import annotations

from .plan import SidePlan
from .sections import Beside
from .triton_gather import at_channels, chosen, where_gathered, whole
from .triton_keys import Keys
from .triton_meta import entry, pointer, read
from .triton_planes import Planes


def held_by(side: SidePlan) -> Beside:
    """Where what is kept of a term's chosen channels stands."""
    assert side.beside is not None
    return side.beside


class Gathered(Planes):
    """Loading which channels are chosen, their scales, and what is kept of them."""

    @property
    def held(self) -> Beside:
        return held_by(self.side)

    @property
    def whole(self) -> SidePlan:
        """The term of all channels, under whose scales the lowest bits stand."""
        return self.plan.side(self.side.name)

    def known(self, index: str = "") -> str:
        """The mask of lanes that are chosen channels; nothing where all are."""
        return f"{self.lane}_in{index}" if self.ragged else ""

    def first(self, half: int) -> str:
        """The first token, within the page, of sub-tile `half`."""
        return f"(page_token + {half * self.plan.half})" if half else "page_token"

    def channel(self, first: str) -> list[str]:
        """Lines that load which channels are chosen for the tokens of the page from `first` on."""
        return chosen(self.plan, self.side, f"{self.prefix}_channel", first, self.lane, self.known())

    def numbers(self, tokens: str) -> list[str]:
        """The line that loads what is kept of these tokens of the page, [tokens, channels]: float16, or whole
        numbers."""
        p, held = self.prefix, self.held
        lane, mask = f"{self.lane}[None, :]", f", mask={self.known('[None, :]')}, other=0" if self.ragged else ""
        if not held.below:
            mask = mask.replace("other=0", "other=0.0")
            return [f"{p}_number = tl.load({p}_numbers + {tokens}[:, None] * {held.count} + {lane}{mask})"]
        shift = f"({tokens} % {held.together} * {held.bits})[:, None]"
        worth = f"(({p}_bits << {held.below}) >> {shift})"
        return [*self.bits(tokens, "tl.int32"), f"{p}_number = {worth} & {(2**held.bits - 1) << held.below}"]

    def bits(self, tokens: str, kind: str) -> list[str]:
        """The line that loads the bytes of these tokens of the page, each with the bits of its neighbours."""
        p, held = self.prefix, self.held
        mask = f", mask={self.known('[None, :]')}, other=0" if self.ragged else ""
        row = f"({tokens} // {held.together})[:, None] * {held.count}"
        return [f"{p}_bits = tl.load({p}_numbers + {row} + {self.lane}[None, :]{mask}).to({kind})"]

    def scales(self, tokens: str, first: str, size: int) -> tuple[list[str], str]:
        """Lines that load the scales of the chosen channels for `size` tokens of the page from `first` on, and which
        axes these have: one for all tokens, or one for each."""
        whole, meta = self.whole, self.whole.layout.meta
        assert meta is not None
        channel, together = f"{self.prefix}_channel", meta.tokens % size == 0
        block = f"{first} // {meta.tokens}" if meta.blocks > 1 else "0"
        if not together:
            block, channel = f"({tokens}[:, None] // {meta.tokens})", f"{channel}[None, :]"
        index = entry(whole, block, channel)
        base, mask = f"{pointer(whole)} + {whole.letter}_meta", self.known("" if together else "[None, :]")
        return read(whole, base, index, self.scale, self.offset, mask=mask), "channels" if together else "all"


class BesideKeys(Gathered, Keys):
    """Scores of the chosen channels."""

    def lane_lines(self) -> list[str]:
        return [*super().lane_lines(), where_gathered(self.plan)]

    def loads(self, query: str) -> list[str]:
        """The whole query, where it is not what the codes meet: its largest number is among those that rows are divided
        by."""
        return self.own([f"x0 = {whole(self.plan)} * scaling"]) if self.whole.mapped else []

    def rows(self) -> list[str]:
        return self.own(["x0"]) if self.whole.mapped else []

    def operands(self) -> list[str]:
        return []

    def prepared(self) -> list[str]:
        return []

    def _scores(self, half: int, tokens: str) -> list[str]:
        return self._met_by(tokens, self.first(half), self.plan.half)

    def tokens(self) -> list[str]:
        p, edge, page = self.prefix, self.plan.edge_tile, self.plan.layout.page_tokens
        first = f"{p}_first = tl.maximum(tile, 0) * {edge} % {page}"
        return self.own([first, *self._met_by("t", f"{p}_first", edge)])

    def _met_by(self, tokens: str, first: str, size: int) -> list[str]:
        """The query at the chosen channels of `size` tokens from `first` on, times what stands there."""
        p = self.prefix
        met = at_channels(self.plan, f"{p}_channel", self.known("[:, None]"))
        lines = [*self.channel(first), f"{p}_met = {met}", f"{p}_met = {p}_met * (scaling * inverse)[None, :]"]
        if self.held.below and not self.precise:
            loads, axes = self.scales(tokens, first, size)
            if axes == "channels":
                return [*lines, *loads, *self._met_in_place(tokens, size)]
        lines += self.numbers(tokens)
        number = f"{p}_number" if not self.held.below and self.exact == "tl.float16" else f"{p}_number.to({self.exact})"
        if self.held.below:
            loads, axes = self.scales(tokens, first, size)
            lines += loads
            if axes == "channels":
                lines.append(f"{p}_met = {p}_met * {self.scale}[:, None]")
            else:
                number = f"({p}_number.to(tl.float32) * {self.scale}).to({self.exact})"
        return [*lines, f"s = tl.dot({number}, {p}_met.to({self.exact}){self.precise})"]

    def _met_in_place(self, tokens: str, size: int) -> list[str]:
        """The same of bits where they stand in their bytes, read as float16 as planes of codes are: what their places
        make of them is taken off behind the product, with what they are worth."""
        p, held = self.prefix, self.held
        place = f"tl.arange(0, {size}) % {held.together} * {held.bits}"
        exponent = 127 + 24 + held.below
        return [
            f"{p}_met = {p}_met * {self.scale}[:, None]",
            *self.bits(tokens, "tl.int16"),
            f"{p}_place = {place}",
            f"{p}_mask = ({2**held.bits - 1} << {p}_place).to(tl.int16)",
            f"{p}_number = common({p}_bits, {p}_mask[:, None])",
            f"{p}_worth = (({exponent} - {p}_place) << 23).to(tl.float32, bitcast=True)",
            f"s = tl.dot({p}_number.to(tl.float16, bitcast=True), {p}_met.to(tl.float16)) * {p}_worth[:, None]",
        ]
