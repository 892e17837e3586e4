"""Scores of a sub-tile of packed tokens, in Triton: prepared queries, planes, dot products, scales behind them.

Operands are swapped: tokens are the rows of every product and the few query rows its columns, [tokens, rows].
"""

from __future__ import annotations

import sympy as sp

from .algebra import query_of_dirty
from .layout import Stream
from .placement import When
from .plan import Plan, SidePlan
from .printer import TilePrinter, number
from .text import padded
from .triton_meta import entry, pointer, read

UNIT = sp.Integer(2) ** 24  # a masked word read as float16 is the code times 2**-24


class Planes:
    """Loading a side's words and taking planes out of them.  Keys lie [tokens, lanes], values [lanes, tokens]."""

    def __init__(self, plan: Plan, side: SidePlan) -> None:
        self.plan, self.side = plan, side
        self.width = side.layout.plane_width
        self.lanes = max(16, padded(self.width))
        self.prefix = side.name[0]
        self.lane = f"{self.prefix}_lane"
        self.transposed = side.name == "values"

    @property
    def ragged(self) -> bool:
        """A plane is narrower than its tile: lanes beyond it are masked."""
        return self.lanes != self.width

    def lane_lines(self) -> list[str]:
        lines = [f"{self.lane} = tl.arange(0, {self.lanes})"]
        if self.ragged:
            lines.append(f"{self.lane}_in = {self.lane} < {self.width}")
        return lines

    def spread(self, tokens: str, lanes: str) -> tuple[str, str]:
        """Index expressions of tokens and lanes for a tile of this side."""
        return (
            (f"{tokens}[None, :]", f"{lanes}[:, None]")
            if self.transposed
            else (f"{tokens}[:, None]", f"{lanes}[None, :]")
        )

    def mask(self, tokens: str) -> str:
        """The mask of a tile load: lanes in range and, if `tokens` names a token mask, tokens too."""
        token, lane = self.spread(tokens, f"{self.lane}_in")
        return " & ".join(([token] if tokens else []) + ([lane] if self.ragged else []))

    def words(self, stream: Stream, tile: int, half: int) -> str:
        which = "" if stream.paired or self.plan.halves == 1 else f"_{half}"
        return f"{self.prefix}{stream.width}_{tile}{which}"

    def load(self, half: int, tokens: str) -> list[str]:
        """Load the words of sub-tile `half`, whose tokens of the page are `tokens`; paired words come with half 0.

        A page is whole, so words of tokens that were never packed are read too: any code, never used."""
        lines = []
        mask = self.mask("")
        other = f", mask={mask}, other=0" if mask else ""
        for stream in self.side.layout.streams:
            if stream.paired and half:
                continue
            token, lane = self.spread("pair" if stream.paired else tokens, self.lane)
            for tile in range(stream.tiles):
                start = stream.offset // 2 + tile * self.width
                address = f"{token} * {stream.row_words} + {lane} + {start}"
                lines.append(f"{self.words(stream, tile, half)} = tl.load(words + {address}{other})")
        for stream in self.side.layout.streams:
            for tile in range(stream.tiles):
                high = half == 1 if stream.paired else True
                if high:
                    name = self.words(stream, tile, half)
                    lines.append(f"{name}_high = upper({name})")
        return lines

    def run(self, stream: Stream, plane: int) -> range:
        """Positions, in the plane's byte, of the planes that share its scale: only those may be read uncleaned."""
        place = stream.places[plane]
        positions = [
            other.bit // stream.width
            for other in stream.places
            if (other.tile, other.byte) == (place.tile, place.byte)
            and self.side.group(other.plane) == self.side.group(plane)
        ]
        return range(min(positions), max(positions) + 1)

    def operand(self, stream: Stream, plane: int, half: int) -> str:
        """The dirty plane as float16: the place's bits of the byte, and those below that share its scale."""
        place = stream.places[plane]
        high = bool(half) if stream.paired else bool(place.byte)
        name = self.words(stream, place.tile, half) + ("_high" if high else "")
        lowest = self.run(stream, plane).start * stream.width
        if place.bit + stream.width == 8 and lowest == 0 and high:
            return f"{name}.to(tl.float16, bitcast=True)"
        return f"plane({name}, {2 ** (place.bit + stream.width) - 2**lowest})"

    def code(self, plane: int, half: int) -> str:
        """The codes of one plane as float32."""
        parts = []
        for stream in self.side.layout.streams:
            place = stream.places[plane]
            high = bool(half) if stream.paired else bool(place.byte)
            name = self.words(stream, place.tile, half) + ("_high" if high else "")
            shifted = f"({name} >> {place.bit})" if place.bit else name
            kept = f"({shifted} & {2**stream.width - 1})"
            parts.append(f"({kept} << {stream.shift})" if stream.shift else kept)
        return f"({' | '.join(parts)}).to(tl.float32)" if len(parts) > 1 else f"{parts[0]}.to(tl.float32)"

    def block(self, half: int) -> str:
        """The token block, within its page, of sub-tile `half` (one block spans the sub-tile)."""
        meta = self.side.layout.meta
        assert meta is not None
        if meta.blocks == 1:
            return "0"
        return f"(page_token + {half * self.plan.half}) // {meta.tokens}" if half else f"page_token // {meta.tokens}"

    def plane_lane(self, plane: int) -> str:
        """The channels of a plane."""
        return f"({self.lane} + {plane * self.width})" if plane else self.lane

    def channel_group(self, plane: int) -> str:
        """The channel group of each lane of a plane."""
        meta = self.side.layout.meta
        assert meta is not None
        lane = self.plane_lane(plane)
        return lane if meta.channels == 1 else f"{lane} // {meta.channels}"

    def decode(self, half: int, tokens: str, guard: str = "") -> list[str]:
        """Decode every plane elementwise into float32 tiles n0, n1, ...: what cannot leave the loop, and unpack."""
        side, lines = self.side, []
        meta = side.layout.meta
        printer = TilePrinter({})
        for plane in range(side.layout.planes):
            lines.append(f"c = {self.code(plane, half)}")
            names = (f"{self.prefix}_scale", f"{self.prefix}_offset")
            if meta is not None:
                token, lane = self.spread(tokens, self.plane_lane(plane))
                token = f"{token} // {meta.tokens}" if meta.tokens > 1 else token
                lane = f"{lane} // {meta.channels}" if meta.channels > 1 else lane
                base = f"{pointer(side)} + {self.prefix}_meta"
                lines += read(side, base, entry(side, token, lane), *names, mask=self.mask(guard))
            elif side.static:
                token, lane = self.spread(tokens, self.lane)
                del token
                lines += static_read(self, plane, lane)
            lines.append(f"n{plane} = {decoded_text(side, printer, 'c', *names)}")
        return lines


def decoded_text(side: SidePlan, printer: TilePrinter, c: str, s: str, z: str) -> str:
    """The decoded number as source over equal-shaped tiles."""
    from .algebra import decoded

    symbols = sp.symbols(f"{c} {s} {z}")
    printer.axes |= {name: ("x",) for name in (c, s, z)}
    return printer.print(decoded(side.store, *symbols), ("x",))


def static_read(planes: Planes, plane: int, lane: str) -> list[str]:
    """Lines that load calibrated scales of one plane's channels into `x_scale` (and `x_offset`)."""
    side = planes.side
    mask = planes.mask("")
    other = f", mask={mask}, other=0.0" if mask else ""
    block, head_dim = side.scale.block, planes.plan.shape.head_dim
    channels = block.channels if isinstance(block.channels, int) else head_dim
    groups = head_dim // channels
    head = "h" if block.heads == 1 else "0"
    channel = f"({lane} + {plane * planes.width})" if plane else lane
    index = f"{head} * {groups} + {channel} // {channels}" if groups > 1 else f"{head} + {lane} * 0"
    heads = planes.plan.shape.kv_heads if block.heads == 1 else 1
    lines = [f"{planes.prefix}_scale = tl.load({side.name}_scale_ptr + {index}{other})"]
    if side.has_offset:
        lines.append(f"{planes.prefix}_offset = tl.load({side.name}_scale_ptr + {heads * groups} + {index}{other})")
    return lines


class Keys(Planes):
    """The keys' part of an attention kernel."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan, plan.keys)
        self.exact = "tl.float32" if plan.shape.dtype == "fp32" else "tl.float16"
        self.precise = ', input_precision="ieee"' if plan.shape.dtype == "fp32" else ""
        self.axes = {"s": ("t", "r"), "total": ("r",), "k_scale": ("t",), "k_offset": ("t",)}

    # ---- once per query -------------------------------------------------------------------------------------------

    def prologue(self, *, exact_rows: bool) -> list[str]:
        """Load the query rows, plane by plane, and prepare them for the planes (and for exact rows)."""
        side, layout = self.side, self.side.layout
        mask = "live[None, :]" + (f" & {self.lane}_in[:, None]" if self.ragged else "")
        lines = [
            f"x{j} = tl.load(query + {self.plane_lane(j)}[:, None], mask={mask}, other=0.0).to(tl.float32) * scaling"
            for j in range(layout.planes)
        ]
        lines += ["top = tl.max(tl.abs(x0), 0)"]
        lines += [f"top = tl.maximum(top, tl.max(tl.abs(x{j}), 0))" for j in range(1, layout.planes)]
        lines += ["size, inverse = above(top)  # [rows]"]
        lines += [f"x{j} = x{j} * inverse[None, :]" for j in range(layout.planes)]
        when = side.when
        if exact_rows or when in (When.IN_LOOP, When.NEVER):
            lines += [f"e{j} = x{j}.to({self.exact})" for j in range(layout.planes)]
        if when is When.AFTER_DOT:
            lines.append("# the query of each plane: surplus bits of the planes below are taken off here")
            lines += self._prepared("x")
            for group in range(side.groups):
                members = [f"x{j}" for j in range(layout.planes) if side.group(j) == group]
                lines.append(f"total{group} = tl.sum({' + '.join(members)}, 0)  # [rows]")
        if when is When.ONCE_PER_QUERY:
            for j in range(layout.planes):
                lines += static_read(self, j, self.lane)
                lines += self._scaled(j)
            lines += self._prepared("y")
            lines.append("total0 = " + " + ".join(f"tl.sum(b{j}, 0)" for j in range(layout.planes)) + "  # [rows]")
        return lines

    def _prepared(self, source: str) -> list[str]:
        """q<width>_<plane> = the combination of query planes that multiplies that dirty plane."""
        lines = []
        for stream in self.side.layout.streams:
            for place in stream.places:
                parts = []
                position = place.bit // stream.width
                for step, factor in query_of_dirty(stream.width, position, self.run(stream, place.plane)):
                    plane = place.plane + step - position
                    parts.append((f"{source}{plane}", factor * 2**stream.shift))
                text = ""
                for name, factor in parts:
                    sign = "-" if factor < 0 else "+"
                    term = name if abs(factor) == 1 else f"{name} * {number(abs(factor))}"
                    text = f"{text} {sign} {term}" if text else term
                target = f"q{stream.width}_{place.plane}"
                lines.append(
                    f"{target} = ({text}).to(tl.float16)" if " " in text else f"{target} = {text}.to(tl.float16)"
                )
        return lines

    def _scaled(self, plane: int) -> list[str]:
        """y<plane>: the query times the channels' scale; b<plane>: what adds up to the offset's share of the score."""
        printer = TilePrinter({"q": ("w", "r"), "s": ("w",), "z": ("w",)})
        lines = []
        for term in self.side.form.terms:
            factor = term.channel_factor if term.coded else term.channel_factor * term.token_factor
            text = printer.print(_plain(factor), ("w", "r"))
            names = {"q": f"x{plane}", "s": "k_scale", "z": "k_offset"}
            target = f"y{plane}" if term.coded else f"b{plane}"
            lines.append(f"{target} = {_renamed(text, names)}")
        return lines

    # ---- once per tile --------------------------------------------------------------------------------------------

    def scores(self, half: int, tokens: str) -> list[str]:
        """s = scores of the sub-tile's packed tokens [tokens, rows], in units of the row's `size`.

        Tokens that were never packed give any number, in their own row only."""
        side, layout = self.side, self.side.layout
        when = side.when
        if side.floats:
            return self._float_scores(tokens)
        lines = self.load(half, tokens)
        if when is When.IN_LOOP:
            lines += self.decode(half, tokens)
            dots = [(f"n{j}.to({self.exact})", f"e{j}") for j in range(layout.planes)]
            return lines + self._dots("s", dots, self.precise)
        base = f"{pointer(side)} + k_meta" if layout.meta is not None else ""
        if when is When.ONCE_PER_TILE:
            lines += self._tile_queries(base, half)
        if when is not When.AFTER_DOT:
            lines += self._dots("s", self._operands(half, range(layout.planes)))
            return lines + [f"s = s * {number(UNIT)} + total0[None, :]"]
        printer = TilePrinter(self.axes)
        for group in range(side.groups):
            members = [j for j in range(layout.planes) if side.group(j) == group]
            name = "s" if side.groups == 1 else f"s{group}"
            lines += self._dots(name, self._operands(half, members))
            lines += read(side, base, entry(side, tokens, str(group)), "k_scale", "k_offset")
            text = printer.print(self._assembled(), ("t", "r"))
            lines.append(f"{name} = {_renamed(text, {'s': name, 'total': f'total{group}'})}")
        if side.groups > 1:
            lines.append("s = " + " + ".join(f"s{group}" for group in range(side.groups)))
        return lines

    def _assembled(self) -> sp.Expr:
        """The score of one group from its dot product `s`, the query's `total`, and the stored numbers."""
        s, total = sp.symbols("s total")
        score = sp.Integer(0)
        for term in self.side.form.terms:
            score += _plain(term.token_factor, {"s": "k_scale", "z": "k_offset"}) * (UNIT * s if term.coded else total)
        factored = sp.factor_terms(score)
        return factored if factored.is_Mul else score

    def _tile_queries(self, base: str, half: int) -> list[str]:
        """Re-derive the prepared queries for the token block of sub-tile `half`."""
        meta, lines = self.side.layout.meta, []
        assert meta is not None
        block = self.block(half)
        mask = f"{self.lane}_in" if self.ragged else ""
        for j in range(self.side.layout.planes):
            index = entry(self.side, block, self.channel_group(j))
            lines += read(self.side, base, index, "k_scale", "k_offset", mask=mask)
            lines += self._scaled(j)
        lines += self._prepared("y")
        lines.append("total0 = " + " + ".join(f"tl.sum(b{j}, 0)" for j in range(self.side.layout.planes)))
        return lines

    def _operands(self, half: int, planes: range | list[int]) -> list[tuple[str, str]]:
        return [
            (self.operand(stream, j, half), f"q{stream.width}_{j}")
            for stream in self.side.layout.streams
            for j in planes
        ]

    def _dots(self, name: str, operands: list[tuple[str, str]], precise: str = "") -> list[str]:
        lines = []
        for i, (left, right) in enumerate(operands):
            so_far = f", {name}" if i else ""
            lines.append(f"{name} = tl.dot({left}, {right}{so_far}{precise})")
        return lines

    def _float_scores(self, tokens: str) -> list[str]:
        fp32 = self.side.floats == "fp32"
        token, lane = self.spread(tokens, self.lane)
        mask = self.mask("")
        other = f", mask={mask}, other=0.0" if mask else ""
        lines = []
        for j in range(self.side.layout.planes):
            address = f"{token} * {self.plan.shape.head_dim} + {lane} + {j * self.width}"
            lines.append(f"k = tl.load(key_floats + {address}{other})")
            left, right = "k", f"e{j}"
            if fp32 and self.exact == "tl.float16":
                right = f"x{j}"
            if not fp32 and self.exact == "tl.float32":
                left = "k.to(tl.float32)"
            precise = ', input_precision="ieee"' if fp32 or self.exact == "tl.float32" else ""
            lines.append(f"s = tl.dot({left}, {right}{', s' if j else ''}{precise})")
        return lines

    def exact_scores(self, guard: str) -> list[str]:
        """s_exact = scores of exact rows at `row` (int64 [tokens]) of the sub-tile."""
        lines = []
        for j in range(self.side.layout.planes):
            token, lane = self.spread("row", self.lane)
            mask = self.mask(guard)
            address = f"{token} * {self.plan.shape.head_dim} + {lane} + {j * self.width}"
            widen = ".to(tl.float32).to(tl.float16)" if self.plan.shape.dtype == "bf16" else ""
            lines.append(f"k = tl.load(key_rows + {address}, mask={mask}, other=0.0){widen}")
            lines.append(f"s_exact = tl.dot(k, e{j}{', s_exact' if j else ''}{self.precise})")
        return lines


def _plain(expression: sp.Expr, names: dict[str, str] | None = None) -> sp.Expr:
    """Indexed symbols without their indices: s[t, g] -> s."""
    names = names or {}
    bases = expression.atoms(sp.Indexed)
    return expression.xreplace({item: sp.Symbol(names.get(str(item.base), str(item.base))) for item in bases})


def _renamed(text: str, names: dict[str, str]) -> str:
    import re

    return re.sub(r"\b[A-Za-z_]\w*\b", lambda match: names.get(match[0], match[0]), text)
