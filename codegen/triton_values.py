"""Weighted sums of a sub-tile of packed values, in Triton: weights times scales, planes, accumulators, and their end.

Accumulators lie [lanes, rows].  Where the scale varies with the token only, they stay in the planes' own basis until the
output; where it varies with the channel within a block of tokens, each tile's sums are brought to real numbers first.
"""

from __future__ import annotations

import sympy as sp

from .algebra import clean_from_dirty
from .placement import When
from .plan import Plan
from .printer import TilePrinter, number
from .triton_keys import UNIT, Planes, _plain, _renamed, static_read
from .triton_meta import entry, pointer, read


class Values(Planes):
    """The values' part of an attention kernel; p is the tile of weights [tokens, rows], decay the factor of the past."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan, plan.values)
        self.when = self.side.when
        self.exact = "tl.float32" if plan.shape.dtype == "fp32" else "tl.float16"
        self.precise = ', input_precision="ieee"' if plan.shape.dtype == "fp32" else ""
        self.rows = "ROWS"

    @property
    def in_planes(self) -> bool:
        """Accumulators stay in the basis of dirty planes through the loops."""
        return self.when in (When.AFTER_DOT, When.ONCE_PER_QUERY)

    def accumulators(self) -> list[str]:
        if self.in_planes:
            return [f"a{s.width}_{j}" for s in self.side.layout.streams for j in range(self.side.layout.planes)]
        return [f"o{j}" for j in range(self.side.layout.planes)]

    def offsets(self) -> list[str]:
        """Names of the per-row sums that carry the offsets, one a channel group."""
        return [f"carried{g}" for g in range(self.side.groups)] if self._offset_weight() is not None else []

    def _offset_weight(self) -> tuple[sp.Expr, sp.Expr] | None:
        """(weight of a token in the offsets' sum, constant taken out of it); None where nothing is carried."""
        if not self.in_planes:
            return None
        terms = [t for t in self.side.form.terms if not t.coded]
        if not terms:
            return None
        if self.when is When.ONCE_PER_QUERY:
            return sp.Symbol("p"), sp.Integer(1)
        total = sum(_plain(t.token_factor * t.channel_factor) for t in terms)
        coefficient, rest = total.as_coeff_Mul()
        return rest, coefficient

    def prologue(self) -> list[str]:
        zero = f"tl.zeros([{self.lanes}, {self.rows}], tl.float32)"
        lines = [f"{name} = {zero}" for name in self.accumulators()]
        return lines + [f"{name} = tl.zeros([{self.rows}], tl.float32)" for name in self.offsets()]

    def accumulate(self, half: int, tokens: str, guard: str = "") -> list[str]:
        """Add a sub-tile's packed values.  `guard` names the mask of packed tokens; p is zero outside it."""
        side, layout = self.side, self.side.layout
        decay = " * decay[None, :]" if half == 0 else ""
        if side.floats:
            return self._float_values(tokens, guard, decay)
        lines = self.load(half, tokens)
        if self.when is When.IN_LOOP:
            lines += self.decode(half, tokens, guard)
            lines.append(f"weight = {self._cast('p')}")
            return lines + [
                f"o{j} = tl.dot(n{j}.to({self.exact}), weight, o{j}{decay}{self.precise})" for j in range(layout.planes)
            ]
        if self.when is When.ONCE_PER_TILE:
            return lines + self._tile_sums(half, guard, decay)
        base = f"{pointer(side)} + v_meta" if layout.meta is not None else ""
        printer = TilePrinter({"p": ("t", "r"), "s": ("t",), "z": ("t",)})
        for group in range(side.groups):
            if self.when is When.AFTER_DOT:
                lines += read(side, base, entry(side, tokens, str(group)), "v_scale", "v_offset", mask=guard)
            coded = next(t for t in side.form.terms if t.coded)
            names = {"s": "v_scale", "z": "v_offset"}
            lines.append(
                f"weight = ({_renamed(printer.print(_plain(coded.token_factor), ('t', 'r')), names)}).to(tl.float16)"
            )
            carried = self._offset_weight()
            if carried is not None:
                text = _renamed(printer.print(carried[0], ("t", "r")), names)
                past = f"carried{group} * decay" if half == 0 else f"carried{group}"
                lines.append(f"carried{group} = {past} + tl.sum({text}, 0)")
            for stream in layout.streams:
                for j in range(layout.planes):
                    if side.group(j) == group:
                        name = f"a{stream.width}_{j}"
                        lines.append(f"{name} = tl.dot({self.operand(stream, j, half)}, weight, {name}{decay})")
        return lines

    def _cast(self, name: str) -> str:
        return name if self.exact == "tl.float32" else f"{name}.to(tl.float16)"

    def _tile_sums(self, half: int, guard: str, decay: str) -> list[str]:
        """Sums of one token block: planes to codes, then the channels' scale and offset of the block."""
        layout, meta = self.side.layout, self.side.layout.meta
        assert meta is not None
        lines = ["weight = p.to(tl.float16)", "weighed = tl.sum(p, 0)  # [rows]"]
        for stream in layout.streams:
            lines += [
                f"a{stream.width}_{j} = tl.dot({self.operand(stream, j, half)}, weight)" for j in range(layout.planes)
            ]
        printer = TilePrinter({"c": ("w", "r"), "s": ("w",), "z": ("w",), "p": ("r",)})
        mask = " & ".join(
            ([f"{self.lane}_in"] if self.ragged else []) + ([f"({self.lane} * 0 + {guard}_any > 0)"] if guard else [])
        )
        for j in range(layout.planes):
            index = entry(self.side, self.block(half), self.channel_group(j))
            lines += read(self.side, f"{pointer(self.side)} + v_meta", index, "v_scale", "v_offset", mask=mask)
            total = sum(
                _plain(t.token_factor * t.channel_factor) * (sp.Symbol("c") / sp.Symbol("p") if t.coded else 1)
                for t in self.side.form.terms
            )
            text = printer.print(sp.expand(total), ("w", "r"))
            text = _renamed(text, {"c": "total", "s": "v_scale", "z": "v_offset", "p": "weighed"})
            lines.append(f"total = {self._clean(j)}")
            lines.append(f"o{j} = o{j}{decay} + {text}")
        return lines

    def _clean(self, plane: int) -> str:
        """The sum of codes of one plane, from the sums over dirty planes."""
        text = ""
        for stream in self.side.layout.streams:
            place = stream.places[plane]
            position = place.bit // stream.width
            parts = clean_from_dirty(stream.width, position, self.run(stream, plane))
            names = [f"a{stream.width}_{plane + step - position}" for step, _ in parts]
            inner = names[0] if len(names) == 1 else f"({names[0]} - {names[1]})"
            factor = parts[0][1] * UNIT * 2**stream.shift
            text += (" + " if text else "") + f"{inner} * {number(factor)}"
        return text

    def _float_values(self, tokens: str, guard: str, decay: str) -> list[str]:
        fp32 = self.side.floats == "fp32" or self.exact == "tl.float32"
        token, lane = self.spread(tokens, self.lane)
        mask = self.mask(guard)
        other = f", mask={mask}, other=0.0" if mask else ""
        lines = [f"weight = {'p' if fp32 else 'p.to(tl.float16)'}"]
        for j in range(self.side.layout.planes):
            address = f"{token} * {self.plan.shape.head_dim} + {lane} + {j * self.width}"
            lines.append(f"v = tl.load(value_floats + {address}{other})")
            value = "v.to(tl.float32)" if fp32 and self.side.floats == "fp16" else "v"
            precise = ', input_precision="ieee"' if fp32 else ""
            lines.append(f"o{j} = tl.dot({value}, weight, o{j}{decay}{precise})")
        return lines

    # ---- exact rows -----------------------------------------------------------------------------------------------

    def exact_prologue(self) -> list[str]:
        """Accumulators of exact rows, where the packed ones are not plain sums of numbers."""
        if not self.in_planes:
            return []
        zero = f"tl.zeros([{self.lanes}, {self.rows}], tl.float32)"
        return [f"o{j} = {zero}" for j in range(self.side.layout.planes)]

    def exact_accumulate(self, half: int, guard: str) -> list[str]:
        """Add exact rows at `row`; p_exact are their weights."""
        decay = " * decay[None, :]" if half == 0 and self.in_planes else ""
        widen = ".to(tl.float32).to(tl.float16)" if self.plan.shape.dtype == "bf16" else ""
        lines = [f"weight = {self._cast('p_exact')}"]
        for j in range(self.side.layout.planes):
            token, lane = self.spread("row", self.lane)
            address = f"{token} * {self.plan.shape.head_dim} + {lane} + {j * self.width}"
            lines.append(f"v = tl.load(value_rows + {address}, mask={self.mask(guard)}, other=0.0){widen}")
            lines.append(f"o{j} = tl.dot(v, weight, o{j}{decay}{self.precise})")
        return lines

    # ---- once per output ------------------------------------------------------------------------------------------

    def epilogue(self) -> list[str]:
        """o0, o1, ... = the outputs of each plane's channels, not yet divided by the mass of weights."""
        if not self.in_planes:
            return []
        side, lines = self.side, []
        for j in range(side.layout.planes):
            text = self._clean(j)
            if self.when is When.AFTER_DOT:
                carried = self._offset_weight()
                if carried is not None:
                    name = f"carried{side.group(j)}"
                    coefficient = "" if abs(carried[1]) == 1 else f" * {number(abs(carried[1]))}"
                    sign = "-" if carried[1] < 0 else "+"
                    one = f"({name}{coefficient})" if coefficient else name
                    text += f" {sign} {one}[None, :]"
                lines.append(f"o{j} = o{j} + {text}")
                continue
            lines += static_read(self, j, self.lane)
            lines.append(f"total = {text}")
            printer = TilePrinter({"c": ("w", "r"), "s": ("w",), "z": ("w",), "p": ("r",)})
            total = sum(
                _plain(t.token_factor * t.channel_factor) * (sp.Symbol("c") / sp.Symbol("p") if t.coded else 1)
                for t in side.form.terms
            )
            out = _renamed(
                printer.print(sp.expand(total), ("w", "r")),
                {"c": "total", "s": "v_scale", "z": "v_offset", "p": "carried0"},
            )
            lines.append(f"o{j} = o{j} + {out}")
        return lines
