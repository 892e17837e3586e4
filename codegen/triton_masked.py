"""Two sketches of keys in Triton, one of channels that are chosen anew every few tokens, each of vectors that have zeros
where the other one looks.

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

BESIDE = 8  # numbers behind a row of a map, the first of which is its sum


def rows_of(side: SidePlan) -> str:
    """What the rows of a sketch's map are called, one a channel, ready for codes."""
    return f"{side.space}_rows"


class MaskedKeys(Keys):
    """Scores of the chosen channels."""

    def __init__(self, plan: Plan, side: SidePlan, head: int | None = None) -> None:
        super().__init__(plan, side, head)
        self.others = Keys(plan, plan.keys)
        self.width_of_choice = max(16, padded(self.held.count))
        self.row = f"(queries * {plan.shape.group})"

    @property
    def held(self) -> Channels:
        """Where the chosen channels stand."""
        return self.side.choice

    def inputs(self) -> list[str]:
        """Arguments beside the query: the maps of both sketches, and how far one head's are apart."""
        spaces = (self.others.side.space, self.side.space)
        return [name for space in spaces for name in (f"{space}_rows_ptr", f"{space}_decode_ptr", f"{space}_stride")]

    def lane_lines(self) -> list[str]:
        """Also where the query's numbers begin, channel by channel: a number of all rows is one read."""
        size, dim = self.plan.shape.head_dim * self.plan.shape.group, self.plan.shape.head_dim
        lines = [*super().lane_lines(), f"{self.prefix}_at = tl.arange(0, {self.width_of_choice})"]
        lines.append(f"gathered = gathered_ptr + bh.to(tl.int64) * queries * {size} + row_index[None, :]")
        for side in (self.others.side, self.side):
            heads = f"h * (({side.space}_stride > 0) * {dim * (side.dim + BESIDE)})"
            lines.append(f"{rows_of(side)} = {rows_of(side)}_ptr + {heads}")
            lines.append(f"{side.space}_decode = {side.space}_decode_ptr + h * {side.space}_stride")
        return lines

    def loads(self, query: str) -> list[str]:
        """The whole query: its largest number is among those that rows are divided by."""
        dim = self.plan.shape.head_dim
        lane = f"tl.arange(0, {padded(dim)})"
        mask = "live[None, :]" + (f" & ({lane} < {dim})[:, None]" if padded(dim) > dim else "")
        return self.own([f"x0 = tl.load(gathered + ({lane} * {self.row})[:, None], mask={mask}, other=0.0) * scaling"])

    def rows(self) -> list[str]:
        return self.own(["x0"])

    def operands(self) -> list[str]:
        return []

    def prepared(self) -> list[str]:
        return []

    def _chosen(self, block: str) -> list[str]:
        """Lines that load which channels are chosen in a block, and the query there, 0 in lanes beyond them."""
        p, count, more = self.prefix, self.held.count, self.width_of_choice > self.held.count
        start = f"{block} * {count} + " if block != "0" else ""
        known = f", mask={p}_at < {count}, other=0" if more else ""
        live = f"live[None, :] & ({p}_at < {count})[:, None]" if more else "live[None, :]"
        return [
            f"{p}_channel = tl.load({p}_channels + {start}{p}_at{known}).to(tl.int32)",
            # of a page that was never written it is any
            f"{p}_channel = tl.minimum({p}_channel, {self.plan.shape.head_dim - 1})",
            f"{p}_met = tl.load(gathered + ({p}_channel * {self.row})[:, None], mask={live}, other=0.0)",
            f"{p}_met = ({p}_met * (scaling * inverse)[None, :]).to({self.exact})",
        ]

    def _scores(self, half: int, tokens: str) -> list[str]:
        block = "0" if self.held.blocks == 1 else f"(page_token{plus(half * self.plan.half)}) // {self.held.tokens}"
        lines = [*self._chosen(block), *self.load(half, tokens)]
        for reader, name in self._readers():
            start = f"{rows_of(reader.side)} + {self.prefix}_channel"
            size = reader.side.dim + BESIDE
            if reader is self:
                lines += read(self.side, self.meta, token_entry(self.side, tokens, 0), self.scale, self.offset)
            operands = ((stream, j) for stream in reader.side.operands for j in range(reader.side.layout.planes))
            for i, (stream, j) in enumerate(operands):
                address = f"{start}[None, :] * {size} + {reader.plane_lane(j)}[:, None]"
                lines.append(f"{self.prefix}_row = tl.load({address}{self._lanes_known(reader, j)})")
                so_far = f", {name}" if i else ""
                lines.append(
                    f"{name} = tl.dot({reader.operand(stream, j, half)}, {self.prefix}_row{so_far}{self.precise})"
                )
            total = f"{self.prefix}_sum"
            lines.append(f"{total} = tl.load({start} * {size} + {reader.side.dim}).to(tl.float32)")
            lines.append(f"{name} = {reader.steps.assembled(name, total, reader.scale, reader.offset)}")
        return [*lines, self._met()]

    def tokens(self) -> list[str]:
        """The same of edge tokens, whose numbers are decoded: those of the others are, already."""
        block = "0"
        if self.held.blocks > 1:
            first = f"tl.maximum(tile, 0) * {self.plan.edge_tile} % {self.plan.layout.page_tokens}"
            block = f"({first} // {self.held.tokens})"
        lines, decoded = [*self._chosen(block), *self.load_tokens("t")], list[str]()
        for reader, name in self._readers():
            start = f"{reader.side.space}_decode + {self.prefix}_channel[None, :] * {reader.side.dim}"
            for j in range(reader.side.layout.planes):
                if reader is self:
                    decoded += self.own([*lines, *self.decode_token(j, "t")])
                    lines = []
                number = reader.own([f"n{j}"])[0]
                address = f"{start} + {reader.plane_lane(j)}[:, None]"
                decoded.append(f"{self.prefix}_row = tl.load({address}{self._lanes_known(reader, j)})")
                so_far = f", {name}" if j else ""
                product = f"{number}.to({self.exact}), {self.prefix}_row.to({self.exact}){so_far}{self.precise}"
                decoded.append(f"{name} = tl.dot({product})")
        return [*decoded, *self.own([self._met()])]

    def _readers(self) -> tuple[tuple[Keys, str], ...]:
        """Both sketches, with the name of what each says of the chosen channels, [tokens, channels]."""
        return ((self, f"{self.prefix}_theirs"), (self.others, f"{self.prefix}_others"))

    def _lanes_known(self, reader: Keys, plane: int) -> str:
        """The mask of a load of rows, where a plane's lanes are not all numbers."""
        inside = reader.inside(plane)
        return f", mask={inside}[:, None], other=0.0" if inside else ""

    def _met(self) -> str:
        p = self.prefix
        return f"s = tl.dot(({p}_theirs - {p}_others).to({self.exact}), {p}_met{self.precise})"
