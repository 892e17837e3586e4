"""Scores of a sub-tile of packed tokens, in Triton: prepared queries, planes, dot products, scales behind them.

Operands are swapped: tokens are the rows of every product and the few query rows its columns, [tokens, rows].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from .placement import When
from .plan import Plan, SidePlan
from .printer import number
from .text import literal, plus
from .tiling import NARROWEST
from .triton_abreast import parted
from .triton_groups import UNIT, halves, in_halves
from .triton_meta import across, static_read
from .triton_pairs import Pairs
from .triton_planes import Planes
from .triton_rope import Positions
from .triton_together import load_together, read_group, read_plane
from .triton_turn import planes_to_rotate, rotated_planes
from .triton_vectors import first_channel

# Products of a query's total that wait for one another.  Microseconds on an H200 with all 32 of `token3` in a row, and
# so: 1 x 8 x 1024 10.34, 10.14, 1 x 8 x 4096 11.82, 11.55.
BEHIND = 8


class Keys(Planes):
    """One term of the keys in an attention kernel."""

    def __init__(self, plan: Plan, side: SidePlan, head: int | None = None) -> None:
        super().__init__(plan, side, head)
        self.exact = "tl.float32" if plan.shape.dtype == "fp32" else "tl.float16"
        self.precise = ', input_precision="ieee"' if plan.shape.dtype == "fp32" else ""
        kind = Pairs if plan.in_pairs else Positions
        self.positions = kind(plan, self, side.rope) if side.rope is not None else None
        several = side.rope is not None and side.joined > 1
        # of the heads whose decoded numbers are mapped back together
        self.readers: list[Planes] = [Planes(plan, side, i) for i in range(side.joined)] if several else [self]

    def inputs(self) -> list[str]:
        """The arguments of this term alone that stand beside the query."""
        return []

    def lane_lines(self) -> list[str]:
        return super().lane_lines() + [line for one in self.readers if one is not self for line in one.head_lines()]

    # ---- once per query -------------------------------------------------------------------------------------------

    def loads(self, query: str) -> list[str]:
        """Load the query rows, plane by plane."""
        if self.plan.rotates:
            return self.own(planes_to_rotate(self, query))
        layout, first = self.side.layout, plus(self.side.first + (self.head or 0) * self.side.dim)
        lines = [f"known = live[None, :] & {self.lane}_in[:, None]"] if self.ragged else []
        whole = "known" if self.ragged else "live[None, :]"
        lines += self.positions.orders() if self.positions is not None else []
        for j in range(layout.planes):
            mask = f"live[None, :] & {self.inside(j)}[:, None]" if self.partial(j) else whole
            channel = self.plane_lane(j) if self.positions is None else self.positions.channel(j)
            load = f"tl.load({query}{first} + {channel}[:, None], mask={mask}, other=0.0)"
            lines.append(f"x{j} = {load}.to(tl.float32) * scaling")
        lines += self.positions.queries() if self.positions is not None else []
        return self.own(lines)

    def loaded(self) -> list[str]:
        """What becomes of loaded planes before anything else."""
        return self.own(rotated_planes(self)) if self.plan.rotates else []

    def rows(self) -> list[str]:
        """The names of the loaded planes."""
        return self.own([f"x{j}" for j in range(self.side.layout.planes)])

    def operands(self) -> list[str]:
        """What decoded numbers meet."""
        return self.own([f"e{j} = x{j}.to({self.exact})" for j in range(self.side.layout.planes)])

    @property
    def decoded(self) -> bool:
        """The main loop multiplies decoded numbers."""
        return self.side.when is When.IN_LOOP or self.side.floats is not None

    def prepared(self) -> list[str]:
        """The query rows made ready for the planes."""
        side, layout, lines = self.side, self.side.layout, []
        when = side.when
        if when is When.AFTER_DOT or when is When.NEVER and not side.floats:
            lines.append("# the query of each plane: surplus bits of the planes below are taken off here")
            lines += [*self.steps.prepared("x"), *self._parted()]
            for group in range(side.groups):
                lines += self._total(group)
        if side.rescaled:
            lines += [*self.steps.prepared("x"), *self._parted()]
        if when is When.ONCE_PER_QUERY:
            for j in range(layout.planes):
                lines += static_read(self, j, self.lane)
                lines += self.steps.scaled(j, f"x{j}", self.scale, self.offset)
            lines += [*self.steps.prepared("y"), *self._parted()]
            if self.steps.offset_in_score:
                lines.append(f"total0 = tl.sum({' + '.join(f'b{j}' for j in range(layout.planes))}, 0)  # [rows]")
        return self.own(lines)

    def _parted(self) -> list[str]:
        """Lines that make of every prepared query two, where tokens stand abreast."""
        planes = range(self.side.layout.planes)
        names = [f"q{stream.width}_{j}" for stream in self.side.operands for j in planes]
        return parted(names) if self.plan.abreast else []

    def _total(self, group: int) -> list[str]:
        """total<group> = the score that the prepared queries of a group make of numbers that are all 1: what products
        read where all bits are set, over the largest code.

        It is rounded as scores are, so that an offset and what the codes have too much of cancel.  And a query with a
        second reader is made an operand once: Triton moves what has one reader into the loop, to be made in each tile.
        """
        side, products = self.side, list[str]()
        affine = not (side.alphabet.looked_up or side.layout.digits)
        for stream in side.operands:
            for j in (place.plane for place in stream.places if side.group(place.plane) == group):
                ones = f"tl.full([{NARROWEST}, {self.lanes}], {self.word_bits(stream, j) if affine else 1}, tl.float16)"
                products += [f"{ones}, q{stream.width}_{j}{end}" for _, end in self.at_once(0)]
        lines, total = list[str](), f"total{group}"
        for i, product in enumerate(products):
            before = f", {total}_{i - 1}" if i % BEHIND else ""
            lines.append(f"{total}_{i} = tl.dot({product}{before})")
        ends = sorted({*range(BEHIND - 1, len(products), BEHIND), len(products) - 1})
        largest = sum((2**stream.width - 1) * 2**stream.shift for stream in side.operands) if affine else 1
        sums = " + ".join(f"{total}_{i}" for i in ends)
        return [*lines, f"{total} = tl.sum({sums}, 0) * {literal(1 / (NARROWEST * largest))}  # [rows]"]

    # ---- once per tile --------------------------------------------------------------------------------------------

    def scores(self, half: int, tokens: str) -> list[str]:
        """s = scores of the sub-tile's packed tokens [tokens, rows], in units of the row's `size`.

        Tokens that were never packed give any number, in their own row only."""
        return self.own(self._scores(half, tokens))

    def _scores(self, half: int, tokens: str) -> list[str]:
        side, layout = self.side, self.side.layout
        when = side.when
        if self.positions is not None:
            return self._turned_back(self.positions, half, tokens)
        if side.floats and not side.polar:
            return self._float_scores(tokens)
        lines = self.load_at_once(half, tokens)
        if side.polar or side.alphabet.in_memory:
            for i, (j, made) in enumerate(self.packed_channels(half, tokens)):
                lines += [*made, self._dot(j, first=not i)]
            return lines
        if when is When.IN_LOOP and self.exact == "tl.float16" and in_halves(self):
            lines += [line for j in range(layout.planes) for line in halves(self, j, self._parts(j, half), tokens)]
            return [
                *lines,
                *self._dots("s", [(f"n{j}", f"e{j}") for j in range(layout.planes)]),
                f"s = s * {2.0**UNIT}",
            ]
        if when is When.IN_LOOP:
            lines += self.decode(half, tokens)
            dots = [(f"n{j}.to({self.exact})", f"e{j}") for j in range(layout.planes)]
            return lines + self._dots("s", dots, self.precise)
        if when is When.ONCE_PER_TILE:
            lines += self._rescaled_queries(half) if side.rescaled else self._tile_queries(half)
        if when not in (When.AFTER_DOT, When.NEVER):
            product = "product" if when is When.ONCE_PER_TILE else "tl.dot"
            lines += self._dots("s", self._operands(half, range(layout.planes)), product=product)
            scaled = "s" if self.steps.lifted == 1 else f"s * {number(self.steps.lifted)}"
            total = " + total0[None, :]" if self.steps.offset_in_score else ""
            lines += [f"s = {scaled}{total}"] if scaled != "s" or total else []
            return lines + ([f"s = s * {across(side, tokens, '')}[:, None]"] if side.layout.across else [])
        lines += load_together(self, half)
        for group in range(side.groups):
            members = [j for j in range(layout.planes) if side.group(j) == group]
            name = "s" if side.groups == 1 else f"s{group}"
            lines += self._dots(name, self._operands(half, members))
            if layout.meta is not None:
                lines += read_group(self, group, half, tokens)
            score = self.steps.assembled(name, f"total{group}", self.scale, self.offset)
            lines += [f"{name} = {score}"] if score != name else []
        summed = ["s = " + " + ".join(f"s{group}" for group in range(side.groups))]
        return lines + summed * (side.groups > 1)

    def _dot(self, plane: int, *, first: bool) -> str:
        """Add a plane's share of the score s, of decoded channels."""
        so_far = "" if first else ", s"
        return f"s = tl.dot(n{plane}.to({self.exact}), e{plane}{so_far}{self.precise})"

    def _turned_back(self, positions: Positions, half: int, tokens: str) -> list[str]:
        """Scores of decoded numbers, each at its token's position."""
        if isinstance(positions, Pairs):
            return positions.scores(half, tokens)
        words = [[] if reader.side.floats else reader.load(half, tokens) for reader in self.readers]
        planes = [reader.packed_channels(half, tokens) for reader in self.readers]
        unmap, wave = positions.unmap, positions.near_waves
        if positions.placed:
            start, own = unmap.first(half) if unmap is not None else [], positions.own_waves
            return start + self._at_positions(positions, words, planes, positions.placed_waves(half), own)
        if positions.anew:
            start, wave = positions.first(half), positions.turned_waves
            start += unmap.first(half) if unmap is not None else []
        elif half:
            start = []
        else:
            turned = (line for j in range(self.side.layout.planes) for line in positions.turned(j))
            start = [*positions.first(), *turned]
        return start + self._at_positions(positions, words, planes, positions.near(half), wave)

    def _at_positions(
        self,
        positions: Positions,
        words: list[list[str]],
        planes: list[Iterator[tuple[int, list[str]]]],
        waves: list[str],
        wave: Callable[[int], list[str]],
    ) -> list[str]:
        """Scores of what every reader decodes of its `words`, by planes; one plane is kept at a time, unless all are
        mapped back first.  `waves` says where the waves are, `wave` loads those of a plane."""
        if positions.unmap is None:
            lines = [*words[0], *waves]
            for j, decoded in planes[0]:
                lines += [*decoded, *wave(j), *positions.dots(j)]
            return lines
        lines = []
        for reader, loads, own in zip(self.readers, words, planes, strict=True):
            made = [line for j, decoded in own for line in (*decoded, *positions.unmap.taken(j))]
            lines += reader.own([*loads, *made])
            lines += positions.unmap.joined(reader)
        lines += [*positions.unmap.begin(), *waves]
        for j in range(self.side.layout.planes):
            lines += [*wave(j), *positions.dots(j)]
        return lines

    def _tile_queries(self, half: int) -> list[str]:
        """Re-derive the prepared queries for the token block of sub-tile `half`."""
        lines = []
        for j in range(self.side.layout.planes):
            lines += read_plane(self, j, half)
            lines += self.steps.scaled(j, f"x{j}", self.scale, self.offset)
        lines += self.steps.prepared("y")
        if self.steps.offset_in_score:
            lines.append(f"total0 = tl.sum({' + '.join(f'b{j}' for j in range(self.side.layout.planes))}, 0)")
        return lines

    def _rescaled_queries(self, half: int) -> list[str]:
        """r<width>_<plane>: the prepared queries times the scale of the sub-tile's token block, in float16: queries in
        float32 kept beside them would fill the registers.  What offsets add is rounded to float16 for two planes at a
        time, whose channels are as many powers of two apart, and summed in float32."""
        lines, streams = [], self.side.operands
        factor, start = f"{self.prefix}_factor", f"{self.prefix}_start"
        sums: dict[int, str] = {}
        last = {self._power(j): j for j in range(self.side.layout.planes)}
        waiting: dict[int, str] = {}
        for j, i, end in ((j, i, end) for i, end in self.at_once(half) for j in range(self.side.layout.planes)):
            lines += [*read_plane(self, j, i), f"{factor} = {self.scale}.to(tl.float16)"]
            for stream in streams:
                scaled = self.steps.times_scale(f"q{stream.width}_{j}{end}", factor, start)
                lines.append(f"r{stream.width}_{j}{end} = {scaled}")
            if self.side.has_offset:
                lines.append(f"{start} = {self.offset}.to(tl.float16)")
            added = self.steps.added(j, f"q{streams[0].width}_{j}{end}", factor, start)
            if added:
                power, value = self._power(j), added[0].split(" = ", 1)[1]
                name = f"b{power}" if power >= 0 else f"b_{-power}"
                if power not in waiting and j != last[power]:
                    waiting[power] = f"{self.prefix}_half_{name}"
                    lines.append(f"{waiting[power]} = {value}")
                    continue
                pair = waiting.pop(power, "")
                value = f"({pair}{' + ' * bool(pair)}{value}).to(tl.float32)"
                lines.append(f"{name} = {f'{name} + {value}' if power in sums else value}")
                sums[power] = name
        terms = [name + (f" * {number(2**power)}" if power else "") for power, name in sums.items()]
        return [*lines, f"total0 = tl.sum({' + '.join(terms)}, 0)"] if terms else lines

    def _power(self, plane: int) -> int:
        """Bits that a plane's codes stand above those of numbers, in what a product reads."""
        stream = self.side.operands[0]
        return stream.places[plane].bit - stream.shift

    def _operands(self, half: int, planes: range | list[int]) -> list[tuple[str, str]]:
        return [
            (self.operand(stream, j, i), f"{'r' if self.side.rescaled else 'q'}{stream.width}_{j}{end}")
            for stream in self.side.operands
            for j in planes
            for i, end in self.at_once(half)
        ]

    def _dots(
        self,
        name: str,
        operands: list[tuple[str, str]],
        precise: str = "",
        product: str = "tl.dot",
        *,
        more: bool = False,
    ) -> list[str]:
        """Lines that add up products; `more`: they are added to what there is of that name."""
        lines = []
        for i, (left, right) in enumerate(operands):
            so_far = f", {name}" if i or more else ""
            lines.append(f"{name} = {product}({left}, {right}{so_far}{precise})")
        return lines

    def _float_scores(self, tokens: str) -> list[str]:
        fp32 = self.side.floats == "fp32"
        token, lane = self.grid(tokens, self.lane)
        mask = self.mask("")
        other = f", mask={mask}, other=0.0" if mask else ""
        lines = []
        for j in range(self.side.layout.planes):
            address = f"{token} * {self.side.dim} + {lane}{plus(j * self.width)}"
            lines.append(f"k = tl.load({self.side.rows} + {address}{other})")
            left, right = "k", f"x{j}" if fp32 and self.exact == "tl.float16" else f"e{j}"
            if not fp32 and self.exact == "tl.float32":
                left = "k.to(tl.float32)"
            precise = ', input_precision="ieee"' if fp32 or self.exact == "tl.float32" else ""
            lines.append(f"s = tl.dot({left}, {right}{', s' if j else ''}{precise})")
        return lines

    # ---- edges ----------------------------------------------------------------------------------------------------

    def tokens(self) -> list[str]:
        """s = scores of edge tokens, decoded."""
        if self.positions is not None:
            return self._tokens_turned_back(self.positions)
        lines = self.load_tokens("t")
        for i, (j, made) in enumerate(self.edge_channels()):
            lines += [*made, self._dot(j, first=not i)]
        return self.own(lines)

    def _tokens_turned_back(self, positions: Positions) -> list[str]:
        """s = scores of edge tokens, decoded, each at its own position."""
        words = [reader.load_tokens("t") for reader in self.readers]
        planes = [reader.edge_channels() for reader in self.readers]
        start = positions.unmap.first(0) if positions.unmap is not None else []
        return start + self._at_positions(positions, words, planes, positions.own(), positions.own_waves)

    def exact_scores(self, there: str, *, more: bool = False) -> list[str]:
        """r = scores of exact edge tokens, where a mask says that they are there, in the planes of the decoded ones;
        `more`: their share is added to it."""
        token, lane = self.grid("row", first_channel(self))
        first = plus(self.side.first) if self.side.stretch else ""
        lines = [f"source = key_rows + {token} * {self.plan.shape.head_dim} + {lane}{first}"]
        for j in range(self.side.layout.planes):
            load = f"tl.load({self.at('source', j)}, mask={self.mask(there, j)}, other=0.0)"
            lines.append(f"k = {load}.to(tl.float32).to({self.exact})")
            lines.append(f"r = tl.dot(k, e{j}{', r' if j or more else ''}{self.precise})")
        return self.own(lines)
