"""Scores of keys where rotary positions turn pairs of planes in float16, in Triton.

Where channels d and d + D/2 are a pair, and planes are as many in either half of a head, partners are the same lane of
two planes: decoded numbers n and m of token t0 + i become n cos - m sin and m cos + n sin, and meet the query turned to
t0.  The cosines and sines of a sub-tile's tokens are the same in every sub-tile, and stay in registers; so does what is
known of every channel, under which levels become numbers, two in an instruction.
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
        lines = [*self.planes.load(half, tokens), *self.first(half)]
        if self.side.ordered:
            return [*lines, *self._ordered(half, tokens)]
        lines += [line for j in self.count for line in self.turned(j)]
        lines += [f"nothing = {unseen(half)}  # 0, which the compiler does not see", *self.near(0)]
        lines.append(f"s = tl.zeros([{self.plan.half}, ROWS], tl.float32)")
        for j in self.firsts:
            m = self._partner(j)
            lines += [*self._number(j, half, tokens), *self._number(m, half, tokens)]
            lines += self.near_waves(m)
            waves = f"{self.planes.prefix}_cosine{j}, {self.planes.prefix}_sine{j}"
            waves += ", cosine.to(tl.float16), sine.to(tl.float16)"
            lines.append(f"s = pair_scores(n{j}, n{m}, {waves}, e{j}, e{m}, h{j}, h{m}, s, {self.aligned})")
        return lines

    def _ordered(self, half: int, tokens: str) -> list[str]:
        """Lines that add up scores of channels whose partners stand anywhere, so that each has waves of its own."""
        p, lines = self.planes.prefix, load_together(self.planes, half)
        for j in self.count:
            lines += [*self._of_tokens(j, half, tokens), *self.turned(j)]
            lines.append(f"s = tl.dot(n{j} * {p}_cosine{j}, e{j}{', s' if j else ''})")
            lines.append(f"s = tl.dot(n{j} * {p}_sine{j}, h{j}, s)")
        return lines

    def _of_tokens(self, plane: int, half: int, tokens: str) -> list[str]:
        """n<plane>, of numbers whose tokens have the scales."""
        planes, group = self.planes, self.planes.one_group(plane)
        if group is None or not together(planes):
            return self._number(plane, half, tokens)
        first = plane == 0 or group != planes.one_group(plane - 1)
        lines = read_group(planes, group, half, tokens) if first else []
        names = (f"{planes.scale}[:, None]", f"{planes.offset}[:, None]")
        lines += planes.letters(plane, half, tokens)
        return [*lines, f"n{plane} = ({planes.steps.number('c', *names)}).to(tl.float16)"]

    def _number(self, plane: int, half: int, tokens: str) -> list[str]:
        """n<plane>: one plane of the sub-tile's loaded words, decoded, float16."""
        planes = self.planes
        if not in_halves(planes):
            return [*planes.decode_plane(plane, half, tokens), f"n{plane} = n{plane}.to(tl.float16)"]
        (stream, *_) = self.side.operands
        level = planes.operand(stream, plane, half)
        return [f"n{plane} = {planes.steps.number(level, f'{planes.scale}{plane}', f'{planes.offset}{plane}')}"]


def in_halves(planes: Planes) -> bool:
    """Whether levels become numbers in float16: those of the parameters, looked up, under scales that are the channels'
    own for all tokens."""
    side = planes.side
    levels = side.alphabet.looked_up and side.alphabet.given and not side.alphabet.unit
    return levels and side.static and side.scale.dtype == "fp16"
