"""Weighted sums of a sub-tile of packed values, in Triton: weights times scales, planes, accumulators, and their end.

Accumulators lie [lanes, rows].  Where the scale varies with the token only, they stay in the planes' own basis until
the output; where it varies with the channel within a block of tokens, each tile's sums are made real numbers first.
"""

from __future__ import annotations

from sympy import Expr

from .placement import When
from .plan import Plan, SidePlan
from .text import plus
from .triton_abreast import apart, masked
from .triton_groups import UNIT, halves, in_halves
from .triton_meta import across, read, static_read, token_entry
from .triton_planes import Planes
from .triton_together import load_together, read_group, read_plane
from .triton_turn import planes_added
from .triton_vectors import first_channel


class Values(Planes):
    """One term of the values in an attention kernel; p are the weights [tokens, rows], decay the factor of the past."""

    def __init__(self, plan: Plan, side: SidePlan, head: int | None = None) -> None:
        super().__init__(plan, side, head)
        self.when = self.side.when
        self.exact = "tl.float32" if plan.shape.dtype == "fp32" else "tl.float16"
        self.precise = ', input_precision="ieee"' if plan.shape.dtype == "fp32" else ""
        self.rows = "ROWS"

    def stores(self, out: str, united: str = "", once: str = "") -> list[str]:
        """Lines that store a tile a plane [lanes, rows], divided by the mass of weights; all rows have a place.
        Of tokens abreast, whose sums threads exchange to add them up, two planes are stored as one.
        `united`: the function that adds up the columns of a row; `once`: the mask of those that are stored."""
        layout, lines = self.side.layout, list[str]()
        if self.plan.adds_planes:
            lines += planes_added("o", layout.planes, layout.plane_width, self.side.hadamard)
        first = plus(self.side.first + (self.head or 0) * self.side.dim)
        pairs = bool(united) and self._paired
        lines += [f"both_lane = tl.arange(0, {2 * self.width})"] * pairs
        for j in range(0, layout.planes, 1 + pairs):
            masks = [f"{once}[None, :]"] * bool(once) + [f"{self.inside(j)}[:, None]"] * bool(self.inside(j))
            number, lane = f"o{j}", self.plane_lane(j)
            if pairs:
                lines.append(f"both = above_each_other(o{j}, o{j + 1})")
                number, lane = "both", f"(both_lane{plus(self.start(j))})" if j else "both_lane"
            number = f"{number} * inverse[None, :]"
            number = f"{united}({number})" if united else number
            lines.append(f"tl.store({out}{first} + {lane}[:, None], {number}{masked(' & '.join(masks))})")
        return self.own(lines)

    @property
    def _paired(self) -> bool:
        """Planes in twos that stand side by side, all of whose lanes are channels."""
        planes = range(self.side.layout.planes)
        beside = all(self.start(j) == j * self.width and not self.inside(j) for j in planes)
        return beside and self.lanes == self.width and len(planes) % 2 == 0

    @property
    def in_planes(self) -> bool:
        """Accumulators stay in the basis of dirty planes through the loops."""
        if self.side.layout.across:  # whose factors are of a tile's own
            return False
        coded = self.when is When.NEVER and not self.side.floats
        return coded or self.when in (When.AFTER_DOT, When.ONCE_PER_QUERY)

    @property
    def in_halves(self) -> bool:
        """The loop's sums are of numbers in halves, see `triton_groups`."""
        return self.when is When.IN_LOOP and self.exact == "tl.float16" and in_halves(self)

    def accumulators(self) -> list[str]:
        if self.in_planes:
            return [f"a{s.width}_{j}" for s in self.side.operands for j in range(self.side.layout.planes)]
        return [f"o{j}" for j in range(self.side.layout.planes)]

    def offsets(self) -> list[str]:
        """Names of the per-row sums that carry the offsets, one a channel group."""
        kept = self._carried() is not None and not self.side.layout.across
        return [f"carried{g}" for g in range(self.side.groups)] if kept else []

    def _carried(self) -> tuple[str, Expr] | None:
        return self.steps.carried("p", self.scale, self.offset)

    def prologue(self) -> list[str]:
        zero = f"tl.zeros([{self.lanes}, {self.rows}], tl.float32)"
        lines = [f"{name} = {zero}" for name in self.accumulators()]
        return self.own(lines + [f"{name} = tl.zeros([{self.rows}], tl.float32)" for name in self.offsets()])

    def accumulate(self, half: int, tokens: str) -> list[str]:
        """Add a sub-tile's packed values under weights p."""
        return self.own(self._accumulate(half, tokens))

    def _accumulate(self, half: int, tokens: str) -> list[str]:
        side, layout = self.side, self.side.layout
        decay = " * decay[None, :]" if half == 0 else ""
        if side.floats and not side.polar:
            return self._float_values(tokens, decay)
        lines = self.load_at_once(half, tokens)
        if side.polar or side.alphabet.in_memory:
            lines.append(f"weight = {self.cast('p')}")
            for j, made in self.packed_channels(half, tokens):
                lines += [*made, f"o{j} = tl.dot(n{j}.to({self.exact}), weight, o{j}{decay}{self.precise})"]
            return lines
        if self.in_halves:
            lines.append("weight = p.to(tl.float16)")
            for j in range(layout.planes):
                lines += halves(self, j, self._parts(j, half), tokens)
                lines.append(f"o{j} = tl.dot(n{j}, weight, o{j}{decay})")
            return lines
        if self.when is When.IN_LOOP:
            lines += self.decode(half, tokens)
            lines.append(f"weight = {self.cast('p')}")
            return lines + [
                f"o{j} = tl.dot(n{j}.to({self.exact}), weight, o{j}{decay}{self.precise})" for j in range(layout.planes)
            ]
        if self.when is When.ONCE_PER_TILE:
            return lines + self._tile_sums(half, decay)
        if side.layout.across:
            return lines + self._balanced_sums(half, tokens, decay)
        carried = self._carried()
        lines += load_together(self, half) if self.when is When.AFTER_DOT else []
        lines += ["p_half = p.to(tl.float16)"] * self.halved
        for group in range(side.groups):
            if self.when is When.AFTER_DOT:
                lines += read_group(self, group, half, tokens)
            lines += apart(self._weight()) if self.plan.abreast else [f"weight = {self._weight()}"]
            if carried is not None:
                lines += self._carry(group, carried[0], half)
            for stream in side.operands:
                for j in (plane for plane in range(layout.planes) if side.group(plane) == group):
                    name, past = f"a{stream.width}_{j}", decay
                    for i, end in self.at_once(half):
                        lines.append(f"{name} = tl.dot({self.operand(stream, j, i)}, weight{end}, {name}{past})")
                        past = ""
        return lines

    @property
    def halved(self) -> bool:
        """Weights and the scales of several groups, or of two tokens, are multiplied in float16, two at a time: one
        rounding more."""
        side, scale = self.side, self.side.store.measure
        if scale is None or self.when is not When.AFTER_DOT or side.groups == 1 and not self.plan.abreast:
            return False
        plain = scale.dtype == "fp16" and not scale.zero_inside and side.second is None
        return plain and side.alphabet.step == 1 and not self.steps.lift

    def _weight(self) -> str:
        """What multiplies a group's codes, in float16."""
        if self.halved:
            return self.steps.weight("p_half", f"{self.scale}.to(tl.float16)")
        weight = self.steps.weight("p", self.scale)
        return f"{f'({weight})' if ' ' in weight else weight}.to(tl.float16)"

    def _carry(self, group: int, added: str, half: int) -> list[str]:
        """Add to the sum that carries a group's offsets: once a tile, what the numbers of one thread make."""
        if len(self.plan.turns) == 1:
            return [f"carried{group} = carried{group} * decay + tl.sum({added}, 0)"]
        lines = [f"added{group} = added{group} + {added}" if half else f"added{group} = {added}"]
        last = half == self.plan.turns[-1]
        return lines + [f"carried{group} = carried{group} * decay + tl.sum(added{group}, 0)"] * last

    def cast(self, name: str) -> str:
        """A number as an operand of products with decoded ones."""
        return name if self.exact == "tl.float32" else f"{name}.to(tl.float16)"

    def _tile_sums(self, half: int, decay: str) -> list[str]:
        """Sums of one token block: planes to codes, then the channels' scale and offset of the block."""
        layout, meta = self.side.layout, self.side.layout.meta
        assert meta is not None
        lines = ["weight = p.to(tl.float16)", "weighed = tl.sum(p, 0)  # [rows]"]
        for stream in self.side.operands:
            lines += [
                f"a{stream.width}_{j} = tl.dot({self.operand(stream, j, half)}, weight)" for j in range(layout.planes)
            ]
        for j in range(layout.planes):
            lines += read_plane(self, j, half)
            lines.append(f"total = {self.steps.clean(j)}")
            lines.append(f"o{j} = o{j}{decay} + {self.steps.output('total', 'weighed', self.scale, self.offset)}")
        return lines

    def _balanced_sums(self, half: int, tokens: str, decay: str) -> list[str]:
        """Sums of one tile under weights times the tokens' scales: planes to codes, then the tile's own factors."""
        side, carried = self.side, self._carried()
        lines = read(side, self.meta, token_entry(side, tokens, 0), self.scale, self.offset)
        lines.append(f"weight = ({self.steps.weight('p', self.scale)}).to(tl.float16)")
        lines += [f"carried0 = tl.sum({carried[0]}, 0)  # [rows]"] if carried is not None else []
        for stream in side.operands:
            lines += [
                f"a{stream.width}_{j} = tl.dot({self.operand(stream, j, half)}, weight)"
                for j in range(side.layout.planes)
            ]
        first = f"page_token + {half * self.plan.half}" if half else "page_token"
        tile = f"({first})" if self.plan.layout.page_tokens > self.side.layout.across.tokens else "0"  # type: ignore[union-attr]
        for j in range(side.layout.planes):
            lines.append(f"{self.prefix}_factor = {across(side, tile, self.plane_lane(j), self.inside(j))}")
            text = self.steps.clean(j)
            text = self.steps.plus_carried(text, 0, carried[1]) if carried is not None else text
            lines.append(f"o{j} = o{j}{decay} + ({text}) * {self.prefix}_factor[:, None]")
        return lines

    def _float_values(self, tokens: str, decay: str) -> list[str]:
        fp32 = self.side.floats == "fp32" or self.exact == "tl.float32"
        token, lane = self.grid(tokens, self.lane)
        mask = self.mask("")
        other = f", mask={mask}, other=0.0" if mask else ""
        lines = [f"weight = {'p' if fp32 else 'p.to(tl.float16)'}"]
        for j in range(self.side.layout.planes):
            address = f"{token} * {self.side.dim} + {lane}{plus(j * self.width)}"
            lines.append(f"v = tl.load({self.side.rows} + {address}{other})")
            value = "v.to(tl.float32)" if fp32 and self.side.floats == "fp16" else "v"
            precise = ', input_precision="ieee"' if fp32 else ""
            lines.append(f"o{j} = tl.dot({value}, weight, o{j}{decay}{precise})")
        return lines

    # ---- edges ----------------------------------------------------------------------------------------------------

    def edge_prologue(self) -> list[str]:
        zero = f"tl.zeros([{self.lanes}, {self.rows}], tl.float32)"
        return [f"{name} = {zero}" for name in self.sums()]

    def sums(self) -> list[str]:
        """Names of the sums over edge tokens, which are of decoded numbers."""
        return self.own([f"o{j}" for j in range(self.side.layout.planes)])

    def tokens(self) -> list[str]:
        """Add decoded edge tokens under `weight` to sums that have decayed."""
        lines = self.load_tokens("t")
        for j, made in self.edge_channels("coded"):
            lines += made
            lines.append(f"v = tl.where(coded[None, :], n{j}, 0.0).to({self.exact})")
            lines.append(f"o{j} = tl.dot(v, weight, o{j}{self.precise})")
        return self.own(lines)

    def exact_tokens(self, there: str) -> list[str]:
        """Add exact edge tokens, where a mask says that they are there, to the same sums."""
        token, lane = self.grid("row", first_channel(self))
        first = plus(self.side.first) if self.side.stretch else ""
        lines = [f"source = value_rows + {token} * {self.side.channels} + {lane}{first}"]
        for j in range(self.side.layout.planes):
            load = f"tl.load({self.at('source', j)}, mask={self.mask(there, j)}, other=0.0)"
            lines.append(f"v = {load}.to(tl.float32).to({self.exact})")
            lines.append(f"o{j} = tl.dot(v, weight, o{j}{self.precise})")
        return self.own(lines)

    # ---- once per output ------------------------------------------------------------------------------------------

    def epilogue(self, *, more: bool = False) -> list[str]:
        """o0, o1, ... = the outputs of each plane's channels, not yet divided by the mass of weights; `more`: added to
        what they were, where sums stay in the basis of planes."""
        if not self.in_planes:
            planes = range(self.side.layout.planes) if self.in_halves else ()
            return self.own([f"o{j} = o{j} * {2.0**UNIT}" for j in planes])
        side, lines, carried = self.side, [], self._carried()
        for j in range(side.layout.planes):
            text = self.steps.clean(j)
            if self.when is When.ONCE_PER_QUERY:
                lines += [*static_read(self, j, self.lane), f"total = {text}"]
                text = self.steps.output("total", "carried0", self.scale, self.offset)
            elif carried is not None:
                text = self.steps.plus_carried(text, side.group(j), carried[1])
            lines.append(f"o{j} = {f'o{j} + ' * more}{text}")
        return self.own(lines)
