"""Scores of keys where rotary positions turn pairs of planes in float16, in Triton.

Where channels d and d + D/2 are a pair, and planes are as many in either half of a head, partners are the same lane of
two planes: decoded numbers n and m of token t0 + i become n cos - m sin and m cos + n sin, and meet the query turned to
t0.  The cosines and sines of a sub-tile's tokens are the same in every sub-tile, and stay in registers; so does what is
known of every channel, under which levels become numbers, two in an instruction.

Where channels stand in an order of the head's own, partners stand anywhere: each number has waves of its own, which
stay in registers as well, and meets the query by its cosine and the query a quarter turn on by its sine.
"""

from __future__ import annotations

from kvdsl.rope import NEAR

from .text import plus
from .triton_meta import static_read
from .triton_planes import Planes
from .triton_rope import Positions
from .triton_together import load_together, read_group, together
from .triton_unmap import unseen


class Pairs(Positions):
    """Positions of `Plan.in_pairs`: k_cosine<plane> and k_sine<plane> are the waves of a sub-tile's tokens."""

    @property
    def aligned(self) -> str:
        """Whether a model turns all channels; else partners are others, and every number has a wave of its own."""
        return f"PAIRS == {self.dim // 2}"

    @property
    def firsts(self) -> range:
        """The planes of the first channels of pairs."""
        return range(self.side.layout.planes // 2)

    def _partner(self, plane: int) -> int:
        return plane + len(self.firsts)

    def queries(self) -> list[str]:
        lines = super().queries()
        for j in self.firsts if not self.side.ordered else ():
            partner = self._partner(j)
            lines.append(f"w{j} = quarter_on(x{partner}, w{j}, {self.aligned})")
            lines.append(f"w{partner} = quarter_on(-x{j}, w{partner}, {self.aligned})")
        return lines

    def prologue(self) -> list[str]:
        """Waves, and scales of channels, float16."""
        p, lane, dim, ordered = self.planes.prefix, self.planes.lane, self.dim, self.side.ordered
        head = f" + h * {NEAR * 2 * dim}" * ordered
        lines = [
            f"tile_waves = tl.full([], {self.plan.tile * dim}, tl.int64)",
            f"near = near_ptr{head} + tl.arange(0, {self.plan.half})[:, None] * {2 * dim} + {lane}[None, :]",
        ]
        for j in self.count if ordered else self.firsts:
            start = self.planes.start(j)
            lines.append(f"{p}_cosine{j} = tl.load(near{plus(start)}).to(tl.float16)")
            lines.append(f"{p}_sine{j} = tl.load(near{plus(dim + start)}).to(tl.float16)")
        for j in self.count if in_halves(self.planes) else ():
            lines += static_read(self.planes, j, self.planes.grid("", lane)[1])
            for name in (self.planes.scale, *[self.planes.offset] * self.side.has_offset):
                lines.append(f"{name}{j} = {name}.to(tl.float16)")
        return lines

    def first(self, half: int = 0) -> list[str]:
        """Where the waves of a sub-tile's first token are."""
        ahead = (self.plan.sinks + half * self.plan.half) * self.dim
        return [f"first_wave = rope_ptr + tile * tile_waves{plus(ahead)}"]

    def scores(self, half: int, tokens: str) -> list[str]:
        """s = scores of the sub-tile's packed tokens [tokens, rows], in units of the row's `size`."""
        lines = [*self.planes.load(half, tokens), *load_together(self.planes, half), *self.first(half)]
        return [*lines, *(self._ordered(half, tokens) if self.side.ordered else self._paired(half, tokens))]

    def _paired(self, half: int, tokens: str) -> list[str]:
        """Lines that add up scores of partners in the same lanes."""
        lines = [line for j in self.count for line in self.turned(j)]
        lines += [f"nothing = {unseen(half)}  # 0, which the compiler does not see", *self.near(0)]
        lines.append(f"s = tl.zeros([{self.plan.half}, ROWS], tl.float32)")
        for j in self.firsts:
            m = self._partner(j)
            before = self._partner(j - 1) if j else None
            lines += [*self._number(j, half, tokens, before), *self._number(m, half, tokens, j)]
            lines += self.near_waves(m)
            waves = f"{self.planes.prefix}_cosine{j}, {self.planes.prefix}_sine{j}"
            waves += ", cosine.to(tl.float16), sine.to(tl.float16)"
            lines.append(f"s = pair_scores(n{j}, n{m}, {waves}, e{j}, e{m}, h{j}, h{m}, s, {self.aligned})")
        return lines

    def _ordered(self, half: int, tokens: str) -> list[str]:
        """Lines that add up scores of channels whose partners stand anywhere."""
        p, lines = self.planes.prefix, list[str]()
        for j in self.count:
            lines += [*self._number(j, half, tokens, j - 1 if j else None), *self.turned(j)]
            lines.append(f"s = tl.dot(n{j} * {p}_cosine{j}, e{j}{', s' if j else ''})")
            lines.append(f"s = tl.dot(n{j} * {p}_sine{j}, h{j}, s)")
        return lines

    def _number(self, plane: int, half: int, tokens: str, before: int | None) -> list[str]:
        """n<plane>: one plane of the sub-tile's loaded words, decoded, float16; `before`: the plane decoded last."""
        planes, side = self.planes, self.side
        if in_halves(planes):
            (stream, *_) = side.operands
            level = planes.operand(stream, plane, half)
            return [f"n{plane} = {planes.steps.number(level, f'{planes.scale}{plane}', f'{planes.offset}{plane}')}"]
        group = planes.one_group(plane) if together(planes) and side.layout.across is None else None
        if group is None:
            return [*planes.decode_plane(plane, half, tokens), f"n{plane} = n{plane}.to(tl.float16)"]
        known = before is not None and planes.one_group(before) == group
        lines = [] if known else read_group(planes, group, half, tokens)
        number = planes.steps.number("c", f"{planes.scale}[:, None]", f"{planes.offset}[:, None]")
        return [*lines, *planes.letters(plane, half, tokens), f"n{plane} = ({number}).to(tl.float16)"]


def in_halves(planes: Planes) -> bool:
    """Whether levels become numbers in float16: those of the parameters, looked up, under scales that are the channels'
    own for all tokens."""
    side = planes.side
    levels = side.alphabet.looked_up and side.alphabet.given and not side.alphabet.unit
    return levels and side.static and side.scale.dtype == "fp16"
