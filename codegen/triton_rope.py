"""Rotary positions in Triton: taken off before packing, put back on decoded keys in a score, and in unpacking.

A score of position t0 + i is sum_d cos(i f_d) y_d q'_d + sin(i f_d) y_d q''_d with the query turned once a tile,
q' = R_t0^-1 q, and q'' the same turned by 90 degrees: whatever the pairs, each number meets its own lane of two
queries.  So it does where channels behind their positions were put in another order, scaled and shifted: number m is
channel d(m), and meets the lanes d(m) of both queries at the frequency of d(m), which all are loaded in that order.
"""

from __future__ import annotations

from kvdsl.rope import NEAR
from kvdsl.scheme import PreRope

from .plan import Plan
from .text import fill, padded, plus
from .triton_places import LOOSE, PLACES, of_tokens, stand_name
from .triton_planes import Planes
from .triton_unmap import Unmap, unseen
from .triton_vectors import first_channel

ROTATE_ROWS = 16  # tokens of a program that rotates rows
INPUTS = ("rope_ptr", "near_ptr", "PAIRS: tl.constexpr")

# A row of rope_ptr holds the cosines of all pairs, then the sines; those beyond the rotated PAIRS have 1 and 0.
ROTATE = """
@triton.jit(do_not_specialize=[$loose])
def $name($args):
    n = tl.program_id(0) * $rows + tl.arange(0, $rows)
    bh = tl.program_id(1)
    b = bh // $heads
    d = tl.arange(0, $padded)
    $where
    other = $other
    pair = $pair
    turn = $sign
    known = inside[:, None] & (d < $dim)[None, :]
    x = tl.load(source_ptr + row[:, None] * $dim + d[None, :], mask=known, other=0.0).to(tl.float32)
    partner = tl.load(source_ptr + row[:, None] * $dim + other[None, :], mask=known, other=0.0).to(tl.float32)
    spoilt = tl.max(nan(x), 1)
    $clean
    wave = rope_ptr + tl.where(inside, $stand, 0).to(tl.int64)[:, None] * $dim + pair[None, :]
    cosine = tl.load(wave, mask=known, other=1.0).to(tl.float64)
    sine = tl.load(wave + $sines, mask=known, other=0.0).to(tl.float64)
    sine = sine * turn[None, :].to(tl.float64)
    y = (x.to(tl.float64) * cosine + partner.to(tl.float64) * sine).to(tl.float32)
    y = tl.where((d < 2 * PAIRS)[None, :], y, x)
    y = spoil(y, spoilt[:, None])
    tl.store(out_ptr + (bh.to(tl.int64) * count + n)[:, None] * $dim + d[None, :], y, mask=known)
"""


def pair(rope: PreRope, lane: str, first: int, count: int) -> str:
    """The pair of each of the channels first + lane, lane < count: its place in a row of cosines."""
    d = f"({lane}{plus(first)})" if first else lane
    return f"{d} // 2" if rope.interleaved else f"pair_of({lane}, {first}, {count}, PAIRS)"


def other(rope: PreRope, lane: str, first: int, count: int) -> str:
    """The other channel of each channel's pair."""
    d = f"({lane}{plus(first)})" if first else lane
    return f"{d} ^ 1" if rope.interleaved else f"partner_of({lane}, {first}, {count}, PAIRS)"


def sign(rope: PreRope, lane: str, first: int, count: int) -> str:
    """-1 for the first channel of a pair, 1 for the second, 0 for channels that are not rotated."""
    if rope.interleaved:
        d = f"({lane}{plus(first)})" if first else lane
        return f"tl.where({d} < 2 * PAIRS, ({d} % 2 * 2 - 1).to(tl.float32), 0.0)"
    return f"turn_of({lane}, {first}, {count}, PAIRS)"


def _rotate(plan: Plan, name: str, back: bool, **holes: list[str] | str | int) -> str:
    """`back`: positions are put back, else taken off."""
    rope, dim = plan.keys.rope, plan.shape.head_dim
    assert rope is not None
    channels = ("d", 0, padded(dim))
    turned = sign(rope, *channels)
    return fill(
        ROTATE, name=name, rows=ROTATE_ROWS, heads=plan.shape.kv_heads, dim=dim, padded=padded(dim),
        stand="stand" if plan.shape.placed else f"u + {plan.sinks}",
        other=other(rope, *channels), pair=pair(rope, *channels), sines=dim // 2,
        sign=turned if back else f"-{turned}", **holes,
    )  # fmt: skip


def unrope(plan: Plan) -> str:
    """The text of `unrope_keys`: tokens u in [low, low + count) of the rows without their positions, to be coded."""
    args = ["source_ptr", "first_ptr", "begin_ptr", "end_ptr", "rope_ptr", "out_ptr", "PAIRS: tl.constexpr"]
    args += ["total_rows", "offset", "ring", "low", "count", *(PLACES if plan.shape.placed else [])]
    where = [
        "u = low + n",
        "inside = (n < count) & (u >= tl.load(begin_ptr + b)) & (u < tl.load(end_ptr + b))",
        "row = (offset + tl.where(inside, u - tl.load(first_ptr + b), 0) % ring).to(tl.int64)",
        "row = bh.to(tl.int64) * total_rows + row",
        *(of_tokens(plan, "u", "inside") if plan.shape.placed else []),
    ]
    clean = ["x = finite(x)", "partner = finite(partner)"]
    loose = '"total_rows", "offset", "ring", "low", "count"' + (LOOSE if plan.shape.placed else "")
    return _rotate(plan, "unrope_keys", False, args=", ".join(args), loose=loose, where=where, clean=clean)


def rope(plan: Plan) -> str:
    """The text of `rope_keys`: decoded numbers (programs, count, D) of tokens from u = low on, at their positions."""
    args = ["coded_ptr", "rope_ptr", "out_ptr", "PAIRS: tl.constexpr", "low", "count"]
    where, loose = ["u = low + n", "inside = n < count", "row = bh.to(tl.int64) * count + n"], '"low", "count"'
    if plan.shape.placed:
        args, where, loose = [*args, *PLACES], [*where, *of_tokens(plan, "u", "inside")], loose + LOOSE
    text = _rotate(plan, "rope_keys", True, args=", ".join(args), loose=loose, where=where, clean=[])
    return text.replace("source_ptr", "coded_ptr").replace("b = bh // " + str(plan.shape.kv_heads) + "\n    ", "")


class Positions:
    """Keys' scores where positions are put back: x<plane> are the query's lanes, w<plane> those a quarter turn on."""

    def __init__(self, plan: Plan, planes: Planes, rope: PreRope) -> None:
        self.plan, self.planes, self.side, self.rope = plan, planes, planes.side, rope
        self.dim = plan.shape.head_dim
        self.operand = "tl.float32" if plan.exact_keys else "tl.float16"
        self.precise = ', input_precision="ieee"' if plan.exact_keys else ""
        self.count = range(planes.side.layout.planes)
        self.unmap = Unmap(plan, planes, self.operand, self.precise) if self.side.mixed else None
        self.placed = plan.shape.placed

    @property
    def anew(self) -> bool:
        """Operands are made for one plane after the other, in every sub-tile: there are no registers for those of all
        planes beside a matrix, or beside where the waves of an order stand."""
        return self.side.mixed or self.side.ordered

    def inputs(self) -> list[str]:
        """The arguments that stand beside the query."""
        found = [name for name in INPUTS if not (self.placed and name == "near_ptr")]
        found += self.unmap.inputs() if self.unmap is not None else []
        found += ["keys_order_ptr"] * self.side.ordered + ["keys_outer_ptr"] * self.side.factored
        return found + ["keys_inner_shift_ptr"] * self.side.shifted

    def _lanes(self, plane: int) -> str:
        """The mask of a load of a plane's lanes, whatever the tokens."""
        mask = self.planes.mask("", plane)
        return f", mask={mask}, other=0.0" if mask else ""

    def _of_head(self, pointer: str, plane: int, before: str = "") -> str:
        """The load of a plane's numbers of head h, which the parameters give (heads, channels)."""
        mask = self.planes.inside(plane)
        at = f"{pointer} + h * {self.dim}{before} + {self.planes.plane_lane(plane)}"
        return f"tl.load({at}{f', mask={mask}, other=0' if mask else ''})"

    def orders(self) -> list[str]:
        """Lines that load order<plane>, where channels stand in an order of the head's own."""
        return [f"order{j} = {self._of_head('keys_order_ptr', j)}" for j in self.count if self.side.ordered]

    def channel(self, plane: int) -> str:
        """The channel of the head that each lane of a plane is: of mixed channels, once they are mapped back."""
        return f"order{plane}" if self.side.ordered else self.planes.plane_lane(plane)

    def queries(self) -> list[str]:
        """Lines that load w<plane>, in the units of x<plane> as it was loaded."""
        lines = []
        for j in self.count:
            lines.append(f"other = {other(self.rope, *self._channels(j))}")
            lines.append(f"turn = -scaling * {sign(self.rope, *self._channels(j))}")
            inside = self.planes.inside(j)
            mask = f"live[None, :] & {inside}[:, None]" if inside else "live[None, :]"
            lines.append(f"w{j} = tl.load(query + other[:, None], mask={mask}, other=0.0).to(tl.float32)")
            if self.side.factored:
                lines.append(f"outer{j} = {self._of_head('keys_outer_ptr', j)}")
                lines.append(f"w{j} = w{j} * (turn * outer{j})[:, None]")
                lines.append(f"x{j} = x{j} * outer{j}[:, None]")
            else:
                lines.append(f"w{j} = w{j} * turn[:, None]")
        return lines

    def prologue(self) -> list[str]:
        """Lines behind the query's, of what stays the same through the loop."""
        return self.unmap.prologue() if self.unmap is not None else []

    def fixed(self) -> list[str]:
        """The operands where positions are those of the tokens themselves."""
        return [f"{name}{j} = {of}{j}.to({self.operand})" for j in self.count for name, of in (("e", "x"), ("h", "w"))]

    def _channels(self, plane: int) -> tuple[str, int, int]:
        """The channels of a plane, for `pair` and its like."""
        if self.side.ordered or self.side.alphabet.vectors:
            return self.channel(plane), 0, self.dim
        return self.planes.lane, self.planes.start(plane), self.planes.width

    def _pair(self, plane: int) -> str:
        """The line that says which pair each lane of a plane is of.  An order is read once more: registers are few."""
        if not self.side.ordered:
            return f"which = {pair(self.rope, *self._channels(plane))}"
        order = self._of_head("keys_order_ptr", plane, f" + {unseen()}")
        return f"which = {pair(self.rope, order, 0, self.dim)}"

    def first(self, half: int = 0) -> list[str]:
        """Where the waves of a tile's first token are; of every `half` apart, where they are read once more."""
        start = f"(nothing + tile) * {self.plan.tile * self.dim}{plus(self.plan.sinks * self.dim)}"
        lines = [f"nothing = {unseen(half)}  # 0, which the compiler does not see"]
        return [*lines, f"first_wave = rope_ptr + {start}"]

    def turned(self, j: int) -> list[str]:
        """The operands of plane j in a tile, from the position of its first token."""
        mask = f", mask={self.planes.inside(j)}, other=0.0" if self.planes.inside(j) else ""
        lines = [self._pair(j), f"cosine = tl.load(first_wave + which{mask})"]
        lines.append(f"sine = tl.load(first_wave{plus(self.dim // 2)} + which{mask})")
        for name, first, sign_, second in (("e", "x", "+", "w"), ("h", "w", "-", "x")):
            text = f"{first}{j} * cosine[:, None] {sign_} {second}{j} * sine[:, None]"
            lines.append(f"{name}{j} = ({text}).to({self.operand})")
        return lines

    def near(self, half: int) -> list[str]:
        """The address of the waves of sub-tile `half`: those of the first tokens of all, the same in every tile; of
        every head in its own order, where it has one, so that lanes are neighbours."""
        tokens = f"({half * self.plan.half} + tl.arange(0, {self.plan.half}))"
        token, lane = self.planes.grid(tokens, first_channel(self.planes))
        head = f" + h * {NEAR * 2 * self.dim}" if self.side.ordered else ""
        return [f"wave = near_ptr{head} + nothing + {token} * {2 * self.dim} + {lane}"]

    def near_waves(self, j: int) -> list[str]:
        """Cosine and sine of a plane's lanes [tokens, lanes]."""
        mask, start = self._lanes(j), self.planes.start(j)
        return [
            f"cosine = tl.load(wave{plus(start)}{mask})",
            f"sine = tl.load(wave{plus(self.dim + start)}{mask})",
        ]

    def turned_waves(self, j: int) -> list[str]:
        """The operands of plane j and its waves, where there are no registers for the operands of all planes."""
        return self.turned(j) + self.near_waves(j)

    def own(self) -> list[str]:
        """The address of the waves of the edge tokens u, a row each."""
        stand = "stand" if self.placed else f"u{plus(self.plan.sinks)}"
        return [f"wave = rope_ptr + tl.where(coded, {stand}, 0).to(tl.int64)[:, None] * {self.dim}"]

    def placed_waves(self, half: int) -> list[str]:
        """The same of the tokens of sub-tile `half`, which stand anywhere."""
        return [f"wave = rope_ptr + {stand_name(self.plan, half)}.to(tl.int64)[:, None] * {self.dim}"]

    def own_waves(self, j: int) -> list[str]:
        mask = self._lanes(j)
        return [
            self._pair(j),
            f"cosine = tl.load(wave + which[None, :]{mask})",
            f"sine = tl.load(wave + which[None, :]{plus(self.dim // 2)}{mask})",
        ]

    def dots(self, j: int) -> list[str]:
        """Add plane j's share of the score s, of n<plane>, or of what they are mapped back to."""
        so_far, lines, name = ", s" if j else "", list[str](), f"n{j}"
        if self.unmap is not None:
            lines, name = self.unmap.plane(j), f"b{j}"
        if self.side.shifted:
            shift = self._of_head("keys_inner_shift_ptr", j, f" + {unseen()}")
            lines.append(f"{name} = {name} + {shift}[None, :]")
        return [
            *lines,
            f"s = tl.dot(({name} * cosine).to({self.operand}), e{j}{so_far}{self.precise})",
            f"s = tl.dot(({name} * sine).to({self.operand}), h{j}, s{self.precise})",
        ]
