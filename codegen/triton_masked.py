"""Two sketches of keys in Triton, one of channels that are chosen anew every few tokens, each of vectors that have
zeros where the other one looks.

The codes of the chosen channels meet the sketch of the query at these channels alone, those of the others what is left
of the sketch of the whole query.  A sketch of some channels is a sum of rows of its map, which are made ready for codes
once and for all: the product of the query there and these rows.  Two sub-tiles that chose their own share it, each with
zeros at the other's channels, so that the sixteen rows of a product are eight of either.

Reading rows is what a program waits for, so they come in pieces of a cache line: microseconds on an H200, `qjl`,
16 x 8 x 16384, of pieces of 32 bytes, a plane's, 241, and of 128 bytes 178.
"""

from __future__ import annotations

from kvdsl.window import TILE

from .plan import Plan, SidePlan
from .sections import Channels
from .text import padded, plus
from .triton_gather import chosen, stride, where_gathered, whole
from .triton_keys import Keys
from .triton_names import tokens_name
from .triton_planes import Planes
from .triton_together import cut, load_together, piece, read_group

SUMS = 8  # numbers a channel behind the rows of a map, the first of which is the sum of its row
DEPTH = 16  # of a product, at least
LINE = 128  # bytes of a cache line
HALF = "tl.float16"  # what codes meet, whatever the query is


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
        self.p = self.top.prefix
        self.in_twos = plan.halves > 1
        """Two sub-tiles are scored at once, in the lines of the first."""

    @property
    def held(self) -> Channels:
        """Where the chosen channels stand."""
        return self.side.choice

    @property
    def several(self) -> bool:
        """The tokens of a tile have chosen more than once, every sub-tile's once."""
        return self.held.tokens < TILE

    @property
    def lanes_chosen(self) -> int:
        """Lanes that the channels of one choice take."""
        return max(DEPTH // 2 if self.several else DEPTH, padded(self.held.count))

    # ---- once per query -------------------------------------------------------------------------------------------

    def inputs(self) -> list[str]:
        """Arguments beside the query: the maps of the sketches, and how far one head's are apart."""
        spaces = [reader.side.space for reader in self.maps]
        return [name for space in spaces for name in (f"{space}_rows_ptr", f"{space}_decode_ptr", f"{space}_stride")]

    def lane_lines(self) -> list[str]:
        """Also which channels each row meets, [rows of two sub-tiles, channels], and where the maps of the head
        begin."""
        p, dim, lanes, count = self.p, self.plan.shape.head_dim, self.lanes_chosen, self.held.count
        lines = [*super().lane_lines(), *self.top.lane_lines()]
        lines.append(f"{p}_of = tl.arange(0, 2 * ROWS) // ROWS  # which of two sub-tiles")
        if self.several:
            lines += [f"{p}_either = tl.arange(0, {2 * lanes})", f"{p}_at = {p}_either % {lanes}"]
            lines.append(f"{p}_mine = {p}_of[:, None] == ({p}_either // {lanes})[None, :]")
        else:
            lines += [f"{p}_at = tl.arange(0, {lanes})", f"{p}_mine = ({p}_of == 0)[:, None]"]
        if self._known:
            lines += [f"{p}_either = {p}_either // {lanes} * {count} + {p}_at"] * self.several
            lines.append(f"{self._known} = {p}_at < {count}")
        known = f" & {self._known}[None, :]" * bool(self._known)
        lines += [where_gathered(self.plan), where_gathered(self.plan, f"{p}_gathered", "twice(row_index)[:, None]")]
        lines.append(f"{p}_meets = {p}_mine & twice(live)[:, None]{known}")
        for side in (reader.side for reader in self.maps):
            heads = f"h * (({side.space}_stride > 0) * {dim * (side.dim + SUMS)})"
            lines.append(f"{rows_of(side)} = {rows_of(side)}_ptr + {heads}")
            lines.append(f"{side.space}_decode = {side.space}_decode_ptr + h * {side.space}_stride")
        return lines

    @property
    def _known(self) -> str:
        """The mask of lanes that are chosen channels; nothing where all are."""
        return f"{self.p}_known" * (self.lanes_chosen > self.held.count)

    def loads(self, query: str) -> list[str]:
        """Also the query itself: its largest number is among those that rows are divided by."""
        return [f"{self.p}_itself = {whole(self.plan)}", *super().loads(query)]

    def loaded(self) -> list[str]:
        return [f"{self.p}_most = tl.max(tl.abs({self.p}_itself * scaling), 0)[None, :]", *super().loaded()]

    def rows(self) -> list[str]:
        return [*super().rows(), f"{self.p}_most"]

    # ---- once per tile --------------------------------------------------------------------------------------------

    def _scores(self, half: int, tokens: str) -> list[str]:
        if self.in_twos and half % 2:
            return [f"s = {self.p}_next"]
        halves = [half, half + 1] if self.in_twos else [half]
        names = [tokens_name(self.plan, i) for i in halves] if self.in_twos else [tokens]
        sums, theirs = ["s", f"{self.p}_next"], [f"{self.p}_theirs", f"{self.p}_theirs_next"]
        lines = self._chosen(half)
        for i, name in zip(halves, names, strict=True):
            lines += [*self.load(i, name), *self.top.load(i, name)]
        for one in self.maps:
            lines += self._products(one, halves, sums, theirs)
        for reader in (self, self.top):
            lines += load_together(reader, half)
        for i, (half_, name) in enumerate(zip(halves, names, strict=True)):
            which = self._which(i)
            lines += self._assembled(self, half_, name, sums[i], f"{self.p}_rest{which}")
            lines += self._assembled(self.top, half_, name, theirs[i], f"{self.p}_sum{which}")
            lines.append(f"{sums[i]} = {sums[i]} + {theirs[i]}")
        return lines

    def _chosen(self, half: int) -> list[str]:
        """Lines that load which channels are chosen for the tokens of the tile from a sub-tile on, and the query there,
        for every row: 0 at channels of other rows."""
        first = f"(page_token + {half * self.plan.half})" if half else "page_token"
        lane = f"{self.p}_either" if self.several and self.in_twos else f"{self.p}_at"
        return self._meet(first, lane, HALF)

    def _meet(self, first: str, lane: str, kind: str) -> list[str]:
        p = self.p
        there = f"{p}_gathered + ({p}_channel * {stride(self.plan)})[None, :]"
        return [
            *chosen(self.plan, self.top.side, f"{p}_channel", first, lane, self._known),
            f"{p}_met = tl.load({there}, mask={p}_meets, other=0.0)",
            f"{p}_met = ({p}_met * twice(scaling * inverse)[:, None]).to({kind})",
        ]

    def _products(self, one: Keys, halves: list[int], sums: list[str], theirs: list[str]) -> list[str]:
        """Lines that multiply codes with sketches of one map, and say what these are of numbers that are all 1."""
        p, side, dim = self.p, one.side, self.plan.shape.head_dim
        (stream,) = side.operands
        of_others, of_own = one is self, one is self.top or len(self.maps) == 1
        lines, at_once = list[str](), self._at_once(one)
        for first in range(0, side.layout.planes, at_once):
            wide = f"tl.arange(0, {at_once * one.width})"
            wide = f"({wide}{plus(first * one.width)})" if first else wide
            lane = wide if at_once > 1 else f"({one.plane_lane(first)})"
            lines += self._sketches(self._rows(rows_of(side), side.dim, lane, one.inside(first)), at_once, HALF)
            for j, (i, half) in ((j, pair) for j in range(first, first + at_once) for pair in enumerate(halves)):
                query = self._sketch(i, j - first)
                if of_others:
                    met = f"q{stream.width}_{j} - {query}"
                    lines += self._dots(sums[i], [(self.operand(stream, j, half), met)], more=j > 0)
                if of_own:
                    operand = self.top.operand(self.top.side.operands[0], j, half)
                    lines += self._dots(theirs[i], [(operand, query)], more=j > 0)
        row = self._rows(f"{rows_of(side)} + {dim * side.dim}", SUMS, f"tl.arange(0, {SUMS})", "")
        lines += [f"{p}_sums = tl.sum(tl.dot({p}_met, {row}), 1)", f"{p}_sum0, {p}_sum1 = halves({p}_sums)"]
        if of_others:
            lines += [f"{p}_rest{i} = total0 - {p}_sum{i}" for i in range(1 + self.several)]
        return lines

    def _assembled(self, reader: Keys, half: int, tokens: str, name: str, total: str) -> list[str]:
        """Lines that put the tokens' scales behind the sums of a sketch's codes."""
        lines = read_group(reader, 0, half, tokens)
        return [*lines, f"{name} = {reader.steps.assembled(name, total, reader.scale, reader.offset)}"]

    # ---- edges ----------------------------------------------------------------------------------------------------

    def tokens(self) -> list[str]:
        """s = scores of edge tokens, whose numbers are decoded."""
        p = self.p
        first = f"{p}_first"
        lines = [f"{first} = tl.maximum(tile, 0) * {self.plan.edge_tile} % {self.plan.layout.page_tokens}"]
        lines += self._meet(first, f"{p}_at", self.exact)
        for reader in (self, self.top):
            side = (self.top if len(self.maps) > 1 and reader is self.top else self).side
            lines += reader.load_tokens("t")
            for j, made in reader.edge_channels():
                row = self._rows(f"{side.space}_decode", side.dim, f"({reader.plane_lane(j)})", reader.inside(j))
                lines += [*made, *self._sketches(f"{row}.to({self.exact})", 1, self.exact)]
                query = self._sketch(0, 0)
                name, met = ("s", f"e{j} - {query}") if reader is self else (f"{p}_theirs", query)
                lines += self._dots(name, [(f"n{j}.to({self.exact})", met)], self.precise, more=j > 0)
        return [*lines, f"s = s + {p}_theirs"]

    # ---- both -----------------------------------------------------------------------------------------------------

    def _at_once(self, one: Keys) -> int:
        """Planes whose rows are read at once."""
        if one.ragged or any(one.partial(j) for j in range(one.side.layout.planes)):
            return 1
        return max(1, min(one.side.layout.planes, LINE // 2 // one.width))

    def _rows(self, start: str, dim: int, lane: str, known: str) -> str:
        """The load of lanes of the chosen channels' rows, of a map that begins somewhere: [channels, lanes]."""
        mask = f", mask={known}[None, :], other=0.0" if known else ""
        return f"tl.load({start} + {self.p}_channel[:, None] * {dim} + {lane}[None, :]{mask})"

    def _sketches(self, rows: str, count: int, kind: str) -> list[str]:
        """Lines that make the sketches of the query for either sub-tile, [lanes, rows], of some planes."""
        p, precise = self.p, "" if kind == HALF else self.precise
        names = [self._whole(i) if count > 1 else piece(self._whole(i), 0, 1) for i in range(2)]
        lines = [f"{p}_rows = {rows}"]
        lines.append(f"{', '.join(names)} = sub_tiles(tl.dot({p}_met, {p}_rows{precise}).to({kind}))")
        for i in range(1 + self.several):
            lines += cut(self._whole(i), count, "planes_apart")
        return lines

    def _whole(self, which: int) -> str:
        """What the sketches for one of two sub-tiles are called."""
        return f"{self.p}_{('query', 'query_next')[which]}"

    def _sketch(self, which: int, place: int) -> str:
        """One of its planes."""
        return piece(self._whole(self._which(which)), place, 1)

    def _which(self, which: int) -> int:
        """Of which of two sub-tiles the channels are that one of them has chosen."""
        return which if self.several else 0
