"""Scores of a sub-tile of packed tokens, in Triton: prepared queries, planes, dot products, scales behind them.

Operands are swapped: tokens are the rows of every product and the few query rows its columns, [tokens, rows].
"""

from __future__ import annotations

from .placement import When
from .plan import Plan
from .printer import number
from .text import plus
from .triton_meta import entry, pointer, read, token_entry
from .triton_planes import Planes, static_read
from .triton_rope import Positions
from .triton_rows import ExactRows


class Keys(Planes):
    """The keys' part of an attention kernel."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan, plan.keys)
        self.exact = "tl.float32" if plan.shape.dtype == "fp32" else "tl.float16"
        self.precise = ', input_precision="ieee"' if plan.shape.dtype == "fp32" else ""
        self.exact_rows = ExactRows(plan, self.side, self.exact, self.precise) if self.side.apart else None
        self.positions = Positions(plan, self, self.side.rope) if self.side.rope is not None else None
        self.query = "turned" if self.side.hoisted else "query"

    def inputs(self) -> list[str]:
        """The arguments that stand beside the query: the turned query, what it adds to a score, rotary positions."""
        if self.positions is not None:
            return self.positions.inputs()
        return ["turned_ptr", *(["bias_ptr"] if self.side.shifted else [])] if self.side.hoisted else []

    # ---- once per query -------------------------------------------------------------------------------------------

    def edge_prologue(self) -> list[str]:
        """The operands for decoded numbers, and for exact ones."""
        if self.exact_rows is None:
            return self._operands_of_rows()
        rows = self.exact_rows
        lines = [*rows.lanes(), *rows.queries(), *self._operands_of_rows([f"r{j}" for j in rows.planes])]
        if self.positions is not None:
            lines = [line for line in lines if not line.startswith("e")]
            lines += [*self.positions.fixed(), *self.positions.prologue()]
        return lines + [f"f{j} = (r{j} * inverse[None, :]).to({self.exact})" for j in rows.planes]

    def _operands_of_rows(self, others: list[str] | None = None) -> list[str]:
        """Load the query rows, plane by plane, as operands; `others` share their size."""
        layout = self.side.layout
        lines = [f"known = live[None, :] & {self.lane}_in[:, None]"] if self.ragged else []
        whole = "known" if self.ragged else "live[None, :]"
        for j in range(layout.planes):
            mask = f"live[None, :] & {self.inside(j)}[:, None]" if self.partial(j) else whole
            load = f"tl.load({self.query} + {self.plane_lane(j)}[:, None], mask={mask}, other=0.0)"
            lines.append(f"x{j} = {load}.to(tl.float32) * scaling")
        turned = [f"w{j}" for j in range(layout.planes)] if self.positions is not None else []
        lines += self.positions.queries() if self.positions is not None else []
        lines += ["top = tl.max(tl.abs(x0), 0)"]
        names = [*(f"x{j}" for j in range(1, layout.planes)), *(others or [])]
        names += turned if self.side.mapped else []  # other factors than those of their partners in x are on them
        lines += [f"top = tl.maximum(top, tl.max(tl.abs({name}), 0))" for name in names]
        lines += ["size, inverse = above(top)  # [rows]"]
        lines += [f"{name} = {name} * inverse[None, :]" for name in (*(f"x{j}" for j in range(layout.planes)), *turned)]
        if self.side.shifted and self.side.hoisted:
            lines.append("bias = tl.load(bias_ptr + head * queries + token, mask=live, other=0.0) * scaling * inverse")
        return lines + [f"e{j} = x{j}.to({self.exact})" for j in range(layout.planes)]

    def prologue(self) -> list[str]:
        """Load the query rows, plane by plane, and prepare them for the planes."""
        side, layout = self.side, self.side.layout
        when = side.when
        lines = self._operands_of_rows()
        if self.positions is not None:
            return [line for line in lines if not line.startswith("e")] + self.positions.prologue()
        if when is not When.IN_LOOP and not side.floats:
            lines = [line for line in lines if not line.startswith("e")]
        if when is When.AFTER_DOT or when is When.NEVER and not side.floats:
            lines.append("# the query of each plane: surplus bits of the planes below are taken off here")
            lines += self.steps.prepared("x")
            for group in range(side.groups):
                members = [f"x{j}" for j in range(layout.planes) if side.group(j) == group]
                lines.append(f"total{group} = tl.sum({' + '.join(members)}, 0)  # [rows]")
        if side.rescaled:
            lines += self.steps.prepared("x")
        if when is When.ONCE_PER_QUERY:
            for j in range(layout.planes):
                lines += static_read(self, j, self.lane)
                lines += self.steps.scaled(j, f"x{j}", "k_scale", "k_offset")
            lines += self.steps.prepared("y")
            if self.steps.offset_in_score:
                lines.append(f"total0 = tl.sum({' + '.join(f'b{j}' for j in range(layout.planes))}, 0)  # [rows]")
        return lines

    # ---- once per tile --------------------------------------------------------------------------------------------

    def scores(self, half: int, tokens: str) -> list[str]:
        """`_scores`, and what a shift adds to each."""
        added = ["s = s + bias[None, :]"] if self.side.shifted and self.side.hoisted else []
        return self._scores(half, tokens) + added

    def _scores(self, half: int, tokens: str) -> list[str]:
        """s = scores of the sub-tile's packed tokens [tokens, rows], in units of the row's `size`.

        Tokens that were never packed give any number, in their own row only."""
        side, layout = self.side, self.side.layout
        when = side.when
        if self.positions is not None:
            return self._turned_back(self.positions, half, tokens)
        if side.floats and not side.polar:
            return self._float_scores(tokens)
        lines = self.load(half, tokens)
        if side.polar:
            for i, (j, made) in enumerate(self.packed_channels(half, tokens)):
                lines += [*made, self._dot(j, first=not i)]
            return lines
        if when is When.IN_LOOP:
            lines += self.decode(half, tokens)
            dots = [(f"n{j}.to({self.exact})", f"e{j}") for j in range(layout.planes)]
            return lines + self._dots("s", dots, self.precise)
        base = f"{pointer(side)} + k_meta" if layout.meta is not None else ""
        if when is When.ONCE_PER_TILE:
            lines += self._rescaled_queries(base, half) if side.rescaled else self._tile_queries(base, half)
        if when not in (When.AFTER_DOT, When.NEVER):
            lines += self._dots("s", self._operands(half, range(layout.planes)))
            scaled = "s" if self.steps.lifted == 1 else f"s * {number(self.steps.lifted)}"
            total = " + total0[None, :]" if self.steps.offset_in_score else ""
            return lines + ([f"s = {scaled}{total}"] if scaled != "s" or total else [])
        for group in range(side.groups):
            members = [j for j in range(layout.planes) if side.group(j) == group]
            name = "s" if side.groups == 1 else f"s{group}"
            lines += self._dots(name, self._operands(half, members))
            if layout.meta is not None:
                lines += read(side, base, token_entry(side, tokens, group), "k_scale", "k_offset")
            score = self.steps.assembled(name, f"total{group}", "k_scale", "k_offset")
            lines += [f"{name} = {score}"] if score != name else []
        if side.groups > 1:
            lines.append("s = " + " + ".join(f"s{group}" for group in range(side.groups)))
        return lines

    def _dot(self, plane: int, *, first: bool) -> str:
        """Add a plane's share of the score s, of decoded channels."""
        so_far = "" if first else ", s"
        return f"s = tl.dot(n{plane}.to({self.exact}), e{plane}{so_far}{self.precise})"

    def _turned_back(self, positions: Positions, half: int, tokens: str) -> list[str]:
        """Scores of decoded numbers, each at its token's position."""
        planes = range(self.side.layout.planes)
        lines = [] if half else positions.turned()
        lines += [] if self.side.floats else self.load(half, tokens)
        for _, made in self.packed_channels(half, tokens):
            lines += made
        lines += [*positions.begin(), *positions.near(half)]
        for j in planes:
            lines += [*positions.near_waves(j), *positions.dots(j)]
        return lines

    def _tile_queries(self, base: str, half: int) -> list[str]:
        """Re-derive the prepared queries for the token block of sub-tile `half`."""
        lines = []
        for j in range(self.side.layout.planes):
            lines += self._block_numbers(base, half, j)
            lines += self.steps.scaled(j, f"x{j}", "k_scale", "k_offset")
        lines += self.steps.prepared("y")
        if self.steps.offset_in_score:
            lines.append(f"total0 = tl.sum({' + '.join(f'b{j}' for j in range(self.side.layout.planes))}, 0)")
        return lines

    def _rescaled_queries(self, base: str, half: int) -> list[str]:
        """r<width>_<plane>: the prepared queries times the scale of the sub-tile's token block, in float16 throughout:
        queries in float32 kept beside them would fill the registers."""
        lines, streams = [], self.side.operands
        sums: dict[int, str] = {}
        for j in range(self.side.layout.planes):
            lines += [*self._block_numbers(base, half, j), "k_factor = k_scale.to(tl.float16)"]
            for stream in streams:
                factor = self.steps.times_scale(f"q{stream.width}_{j}", "k_factor", "k_start")
                lines.append(f"r{stream.width}_{j} = {factor}")
            if self.side.has_offset:
                lines.append("k_start = k_offset.to(tl.float16)")
            added = self.steps.added(j, f"q{streams[0].width}_{j}", "k_factor", "k_start")
            if added:
                power = streams[0].places[j].bit - streams[0].shift
                name = f"b{power}" if power >= 0 else f"b_{-power}"
                value = added[0].split(" = ", 1)[1]
                lines.append(f"{name} = {f'{name} + {value}' if power in sums else value}")
                sums[power] = name
        terms = [f"{name}.to(tl.float32)" + (f" * {number(2**power)}" if power else "") for power, name in sums.items()]
        return [*lines, f"total0 = tl.sum({' + '.join(terms)}, 0)"] if terms else lines

    def _block_numbers(self, base: str, half: int, plane: int) -> list[str]:
        """Lines that read a plane's scales and offsets of the token block of sub-tile `half`."""
        index = entry(self.side, self.block(half), self.channel_group(plane))
        return read(self.side, base, index, "k_scale", "k_offset", mask=self.inside(plane))

    def _operands(self, half: int, planes: range | list[int]) -> list[tuple[str, str]]:
        return [
            (self.operand(stream, j, half), f"{'r' if self.side.rescaled else 'q'}{stream.width}_{j}")
            for stream in self.side.operands
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
        token, lane = self.grid(tokens, self.lane)
        mask = self.mask("")
        other = f", mask={mask}, other=0.0" if mask else ""
        lines = []
        for j in range(self.side.layout.planes):
            address = f"{token} * {self.side.dim} + {lane}{plus(j * self.width)}"
            lines.append(f"k = tl.load(key_floats + {address}{other})")
            left, right = "k", f"e{j}"
            if fp32 and self.exact == "tl.float16":
                right = f"x{j}"
            if not fp32 and self.exact == "tl.float32":
                left = "k.to(tl.float32)"
            precise = ', input_precision="ieee"' if fp32 or self.exact == "tl.float32" else ""
            lines.append(f"s = tl.dot({left}, {right}{', s' if j else ''}{precise})")
        return lines

    def either(self) -> list[str]:
        """s = scores of edge tokens: decoded where `coded`, from exact rows where `exact`."""
        lines = self.load_tokens("t")
        if self.exact_rows is not None:
            for i, (j, made) in enumerate(self.edge_channels()):
                lines += made
                lines += [self._dot(j, first=not i)] if self.positions is None else []
            if self.positions is not None:
                lines += [*self.positions.begin(), *self.positions.own()]
                for j in range(self.side.layout.planes):
                    lines += [*self.positions.own_waves(j), *self.positions.dots(j)]
            lines += ["s = s + bias[None, :]"] * (self.side.shifted and self.side.hoisted)
            return [*lines, *self.exact_rows.scores(), "s = tl.where(coded[:, None], s, r)"]
        token, lane = self.grid("row", self.lane)
        lines.append(f"source = key_rows + {token} * {self.plan.shape.head_dim} + {lane}")
        for i, (j, made) in enumerate(self.edge_channels()):
            lines += made
            mask = self.mask("exact", j)
            lines.append(f"k = tl.load({self.at('source', j)}, mask={mask}, other=0.0).to(tl.float32)")
            lines.append(f"k = tl.where(coded[:, None], n{j}, k).to({self.exact})")
            lines.append(f"s = tl.dot(k, e{j}{', s' if i else ''}{self.precise})")
        return lines
