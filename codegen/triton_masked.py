"""Two sketches of keys in Triton, one of channels that are chosen anew every few tokens, each of vectors that have
zeros where the other one looks.

A score is q . k' of the sketch of the others, as if it were of all channels, plus sum_m q[m] (k''[m] - k'[m]) over the
chosen channels m: what their own sketch says there instead of the other one.  So no query is made for every choice: a
number k[m] is the score of a query that is 1 at m, and these are made ready for codes once and for all.
"""

from __future__ import annotations

from .plan import Plan, SidePlan
from .sections import Channels
from .text import padded, plus
from .triton_keys import Keys
from .triton_meta import read, token_entry
from .triton_planes import Planes

BESIDE = 8  # numbers behind a row of a map, the first of which is its sum
DEPTH = 16  # of a product


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
        self.row = f"(queries * {plan.shape.group})"
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
        """Also where the query's numbers begin, channel by channel: a number of all rows is one read."""
        size, dim = self.plan.shape.head_dim * self.plan.shape.group, self.plan.shape.head_dim
        lines = [*super().lane_lines(), *self.top.lane_lines()]
        lines.append(f"{self.p}_at = tl.arange(0, {self.lanes_chosen})")
        lines.append(f"gathered = gathered_ptr + bh.to(tl.int64) * queries * {size} + row_index[None, :]")
        for side in (reader.side for reader in self.maps):
            heads = f"h * (({side.space}_stride > 0) * {dim * (side.dim + BESIDE)})"
            lines.append(f"{rows_of(side)} = {rows_of(side)}_ptr + {heads}")
            lines.append(f"{side.space}_decode = {side.space}_decode_ptr + h * {side.space}_stride")
        return lines

    def loads(self, query: str) -> list[str]:
        """Also the query itself: its largest number is among those that rows are divided by."""
        dim = self.plan.shape.head_dim
        lane = f"tl.arange(0, {padded(dim)})"
        mask = "live[None, :]" + (f" & ({lane} < {dim})[:, None]" if padded(dim) > dim else "")
        load = f"tl.load(gathered + ({lane} * {self.row})[:, None], mask={mask}, other=0.0)"
        return [f"{self.p}_most = tl.max(tl.abs({load} * scaling), 0)[None, :]", *super().loads(query)]

    def rows(self) -> list[str]:
        return [*super().rows(), f"{self.p}_most"]

    # ---- once per tile --------------------------------------------------------------------------------------------

    def _chosen(self, block: str) -> list[str]:
        """Lines that load which channels are chosen in a block, and the query there, 0 in lanes beyond them.

        A product is of 16 numbers or more: of fewer channels each stands in two lanes, for either sketch."""
        p, count, lanes, start = self.p, self.held.count, self.lanes_chosen, f"{block} * {self.held.count} + "
        start = "" if block == "0" else start
        known = f", mask={p}_at < {count}, other=0" if lanes > count else ""
        lines = [f"{p}_channel = tl.load({p}_channels + {start}{p}_at{known}).to(tl.int32)"]
        # of a page that was never written it is any
        lines.append(f"{p}_channel = tl.minimum({p}_channel, {self.plan.shape.head_dim - 1})")
        at, channel = f"{p}_at", f"{p}_channel"
        if lanes < DEPTH:
            at, channel = f"{p}_twice", f"{p}_channel_twice"
            lines.append(f"{at} = tl.arange(0, {2 * lanes}) // 2")
            known = known.replace(f"{p}_at", at)
            lines.append(f"{channel} = tl.load({p}_channels + {start}{at}{known}).to(tl.int32)")
            lines.append(f"{channel} = tl.minimum({channel}, {self.plan.shape.head_dim - 1})")
        live = f"live[None, :] & ({at} < {count})[:, None]" if lanes > count else "live[None, :]"
        lines.append(f"{p}_met = tl.load(gathered + ({channel} * {self.row})[:, None], mask={live}, other=0.0)")
        return [*lines, f"{p}_met = ({p}_met * (scaling * inverse)[None, :]).to({self.exact})"]

    def _met(self) -> str:
        """What both sketches say of the chosen channels, [tokens, channels], under the query there."""
        theirs, others = f"{self.p}_theirs", f"{self.p}_others"
        if self.lanes_chosen < DEPTH:
            both = f"tl.join({theirs}, -{others}).reshape([{theirs}.shape[0], {2 * self.lanes_chosen}])"
        else:
            both = f"({theirs} - {others})"
        return f"s = tl.dot({both}.to({self.exact}), {self.p}_met, s{self.precise})"

    def _scores(self, half: int, tokens: str) -> list[str]:
        block = "0" if self.held.blocks == 1 else f"(page_token{plus(half * self.plan.half)}) // {self.held.tokens}"
        lines = [*self._chosen(block), *self.load(half, tokens), *self.top.load(half, tokens)]
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
        return [*lines, self._met()]

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
        block = "0"
        if self.held.blocks > 1:
            first = f"tl.maximum(tile, 0) * {self.plan.edge_tile} % {self.plan.layout.page_tokens}"
            block = f"({first} // {self.held.tokens})"
        lines = self._chosen(block)
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
        return [*lines, self._met()]

    def _lanes_known(self, reader: Keys, plane: int) -> str:
        """The mask of a load of rows, where a plane's lanes are not all numbers."""
        inside = reader.inside(plane)
        return f", mask={inside}[:, None], other=0.0" if inside else ""
