"""Two sketches of keys in Triton, one of channels that are chosen anew every few tokens, each of vectors that have
zeros where the other one looks.

A score is q . k' of the sketch of the others, as if it were of all channels, plus sum_m q[m] (k''[m] - k'[m]) over the
chosen channels m: what their own sketch says there instead of the other one.  So no query is made for every choice: a
number k[m] is the score of a query that is 1 at m, and these are made ready for codes once and for all.
"""

from __future__ import annotations

from .plan import Plan, SidePlan
from .sections import Channels
from .text import padded
from .triton_gather import at_channels, chosen, where_gathered, whole
from .triton_keys import Keys
from .triton_meta import read, token_entry
from .triton_planes import Planes

BESIDE = 8  # numbers behind a row of a map, the first of which is its sum
DEPTH = 16  # of a product, at least


def rows_of(side: SidePlan) -> str:
    """What the rows of a sketch's map are called, one a channel, ready for codes."""
    return f"{side.space}_rows"


def alike(plan: Plan) -> bool:
    """Whether both sketches are of one map."""
    others, own = plan.keys.terms[:2]
    return others.store.code == own.store.code


class MaskedKeys(Keys):
    """Scores of both sketches."""

    def __init__(self, plan: Plan, side: SidePlan) -> None:
        super().__init__(plan, side)
        assert side.rest is not None
        self.top = Keys(plan, side.rest)
        self.readers: list[Planes] = [self, self.top]
        self.maps = (self,) if alike(plan) else (self, self.top)
        self.lanes_chosen = max(8, padded(self.held.count))
        self.p = self.top.prefix

    @property
    def held(self) -> Channels:
        """Where the chosen channels stand."""
        return self.side.choice

    # ---- once per query -------------------------------------------------------------------------------------------

    def inputs(self) -> list[str]:
        """Arguments beside the query: the maps of the sketches, and how far one head's are apart."""
        spaces = [reader.side.space for reader in self.maps]
        return [name for space in spaces for name in (f"{space}_rows_ptr", f"{space}_decode_ptr", f"{space}_stride")]

    def lane_lines(self) -> list[str]:
        """Also where the maps of the head begin."""
        dim = self.plan.shape.head_dim
        lines = [*super().lane_lines(), *self.top.lane_lines()]
        lines.append(f"{self.p}_at = tl.arange(0, {self.lanes_chosen})")
        lines.append(where_gathered(self.plan))
        for side in (reader.side for reader in self.maps):
            heads = f"h * (({side.space}_stride > 0) * {dim * (side.dim + BESIDE)})"
            lines.append(f"{rows_of(side)} = {rows_of(side)}_ptr + {heads}")
            lines.append(f"{side.space}_decode = {side.space}_decode_ptr + h * {side.space}_stride")
        return lines

    def loads(self, query: str) -> list[str]:
        """Also the query itself: its largest number is among those that rows are divided by."""
        return [f"{self.p}_most = tl.max(tl.abs({whole(self.plan)} * scaling), 0)[None, :]", *super().loads(query)]

    def rows(self) -> list[str]:
        return [*super().rows(), f"{self.p}_most"]

    # ---- once per tile --------------------------------------------------------------------------------------------

    def _chosen(self, first: str) -> list[str]:
        """Lines that load which channels are chosen for the tokens of the page from `first` on, and the query there, 0
        in lanes beyond them."""
        p, count = self.p, self.held.count
        known = f"{p}_at < {count}" * (self.lanes_chosen > count)
        met = at_channels(self.plan, f"{p}_channel", f"({known})[:, None]" if known else "")
        return [
            *chosen(self.plan, self.top.side, f"{p}_channel", first, f"{p}_at", known),
            f"{p}_met = {met} * (scaling * inverse)[None, :]",
        ]

    def _met(self) -> list[str]:
        """What both sketches say of the chosen channels, [tokens, channels], under the query there.  A tensor core's
        product is of 16 numbers or more: those of fewer are added up one by one."""
        difference, met = f"{self.p}_theirs - {self.p}_others", f"{self.p}_met"
        if self.lanes_chosen < DEPTH:
            return [f"{met} = tl.sum(({difference})[:, :, None] * {met}[None, :, :], 1)", f"s = s + {met}"]
        return [f"s = tl.dot(({difference}).to({self.exact}), {met}.to({self.exact}), s{self.precise})"]

    def _scores(self, half: int, tokens: str) -> list[str]:
        first = f"(page_token + {half * self.plan.half})" if half else "page_token"
        lines = [*self._chosen(first), *self.load(half, tokens), *self.top.load(half, tokens)]
        theirs, others, row, total = (f"{self.p}_{name}" for name in ("theirs", "others", "row", "sum"))
        for one in self.maps:
            start, size = f"{rows_of(one.side)} + {self.p}_channel", one.side.dim + BESIDE
            of_top = one is self.top or len(self.maps) == 1
            (stream,) = one.side.operands
            for j in range(one.side.layout.planes):
                so_far = f", {{}}{self.precise}" if j else self.precise
                address = f"{start}[None, :] * {size} + {one.plane_lane(j)}[:, None]"
                lines.append(f"{row} = tl.load({address}{self._lanes_known(one, j)})")
                if one is self:
                    plane = f"{self.prefix}_plane"
                    lines.append(f"{plane} = {self.operand(stream, j, half)}")
                    lines.append(f"s = tl.dot({plane}, q{stream.width}_{j}{so_far.format('s')})")
                    lines.append(f"{others} = tl.dot({plane}, {row}{so_far.format(others)})")
                if of_top:
                    operand = self.top.operand(self.top.side.operands[0], j, half)
                    lines.append(f"{theirs} = tl.dot({operand}, {row}{so_far.format(theirs)})")
            lines.append(f"{total} = tl.load({start} * {size} + {one.side.dim}).to(tl.float32)")
            if one is self:
                lines += self._assembled(self, tokens, {"s": "total0", others: total})
            if of_top:
                lines += self._assembled(self.top, tokens, {theirs: total})
        return [*lines, *self._met()]

    def _assembled(self, reader: Keys, tokens: str, totals: dict[str, str]) -> list[str]:
        """Lines that put the tokens' scales behind sums of a sketch's codes: name -> that of what its query adds."""
        entry = token_entry(reader.side, tokens, 0)
        lines = read(reader.side, reader.meta, entry, reader.scale, reader.offset)
        for name, total in totals.items():
            lines.append(f"{name} = {reader.steps.assembled(name, total, reader.scale, reader.offset)}")
        return lines

    # ---- edges ----------------------------------------------------------------------------------------------------

    def tokens(self) -> list[str]:
        """s = scores of edge tokens, whose numbers are decoded."""
        first = f"{self.p}_first"
        lines = [f"{first} = tl.maximum(tile, 0) * {self.plan.edge_tile} % {self.plan.layout.page_tokens}"]
        lines += self._chosen(first)
        for reader, name in ((self, f"{self.p}_others"), (self.top, f"{self.p}_theirs")):
            one = self.top if len(self.maps) > 1 and reader is self.top else self
            start = f"{one.side.space}_decode + {self.p}_channel[None, :] * {one.side.dim}"
            lines += reader.load_tokens("t")
            for j, made in reader.edge_channels():
                lines += made
                if reader is self:
                    lines.append(self._dot(j, first=not j))
                address = f"{start} + {reader.plane_lane(j)}[:, None]"
                lines.append(f"{self.p}_row = tl.load({address}{self._lanes_known(reader, j)}).to({self.exact})")
                so_far = f", {name}" if j else ""
                lines.append(f"{name} = tl.dot(n{j}.to({self.exact}), {self.p}_row{so_far}{self.precise})")
        return [*lines, *self._met()]

    def _lanes_known(self, reader: Keys, plane: int) -> str:
        """The mask of a load of rows, where a plane's lanes are not all numbers."""
        inside = reader.inside(plane)
        return f", mask={inside}[:, None], other=0.0" if inside else ""
