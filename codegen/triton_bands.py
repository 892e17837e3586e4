"""Radii and angles of several levels in Triton: each band is read in the lanes of the channels that it tells of, and
radii become channels level by level.

Channel d of D has the radius d % (D / 2^levels) and of level l the angle d % (D / 2^l): its cosine where
d % (D / 2^(l - 1)) is in the first half, else its sine.  With planes of N lanes, N a divisor or a multiple of each of
these counts, a plane of channels needs one plane of each band, whose numbers are repeated over the lanes where the band
has fewer than N.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from .layout import Place, SideLayout, Stream
from .plan import Plan, SidePlan
from .sections import Span
from .text import plus
from .tiling import NARROWEST, PAIR
from .triton_keys import Keys
from .triton_planes import Planes
from .triton_values import Values


def lanes(side: SidePlan) -> int:
    """N, of a side given by its first band: the width of the planes that the angles of the first level lie in, if it
    fits all bands, else the smallest count of a band that fills a tensor-core operand."""
    counts = [term.dim for term in side.terms[1:]]
    own = side.terms[1].layout.plane_width
    if own >= NARROWEST and all(count % own == 0 or own % count == 0 for count in counts):
        return own
    return min(count for count in counts if count >= NARROWEST)


def times(factor: int) -> str:
    """A factor behind an index, where it is one."""
    return f" * {factor}" if factor != 1 else ""


def _spans(count: int, width: int) -> tuple[Span, ...]:
    return tuple(Span(start, 0, width) for start in range(0, max(count, width), width))


class Stretch(Planes):
    """One band, read in planes of as many lanes as the whole side's."""

    def __init__(self, plan: Plan, term: SidePlan, width: int) -> None:
        spans = _spans(term.dim, width)
        places = tuple(Place(j, 0, 0, 0) for j in range(len(spans)))
        codes = tuple(Stream(s.width, s.shift, True, 0, 0, 0, places) for s in term.layout.streams)  # one a word
        layout = replace(term.layout, plane_width=width, spans=spans, streams=codes)
        super().__init__(plan, replace(term, layout=layout))
        self.term, self.lane = term, f"{term.name[0]}_lane"

    def plane_lane(self, plane: int) -> str:
        """Which numbers of the band the lanes of a plane take."""
        if self.term.dim < self.width:
            return f"({self.lane} % {self.term.dim})"
        return super().plane_lane(plane)

    def given_lines(self) -> list[str]:
        """Where each lane finds its codes, if that is not the same for all lanes of a plane."""
        lines = []
        for stream in self.term.layout.streams:
            for plane in range(self.side.layout.planes):
                if self._plane_of(plane) is not None:
                    continue
                index, width, at = self.plane_lane(plane), self.term.layout.plane_width, self._at(stream, plane)
                place, tiles = f"{at}_plane", ""
                if stream.tiles > 1:
                    tiles = f"{place} // {self._a_tile(stream)}{times(width)} + "
                    place = f"{place} % {self._a_tile(stream)}"
                lines.append(f"{at}_plane = {index}{f' // {width}' if width > 1 else ''}")
                lines.append(f"{at} = {tiles}{index} % {width}{plus(stream.offset // 2)}")
                lines.append(f"{at}_bit = {place}{times(stream.width)}")
        return lines

    def _at(self, stream: Stream, plane: int) -> str:
        return f"{self.prefix}{stream.width}_at{plane}"

    @staticmethod
    def _a_tile(stream: Stream) -> int:
        """Planes whose codes stand in one tile of bytes, or of words."""
        return (8 if stream.paired else 16) // stream.width

    def _plane_of(self, plane: int) -> int | None:
        """The plane of the band that holds all lanes of a plane read; None where there are several."""
        width, start = self.term.layout.plane_width, plane * self.width
        if self.term.dim == width:
            return 0
        inside = self.term.dim >= self.width and start // width == (start + self.width - 1) // width
        return start // width if inside else None

    def numbers(self, plane: int, tokens: str, half: int | None, guard: str = "") -> list[str]:
        """n<mark><plane>: a plane decoded, float32, of sub-tile `half`, or of edge tokens where it is None."""
        if self.term.floats:
            token, lane = self.grid(tokens, self.plane_lane(plane))
            mask = self.mask(guard, plane)
            other = f", mask={mask}, other=0.0" if mask else ""
            load = f"tl.load({self.term.rows} + {token} * {self.term.dim} + {lane}{other})"
            return self.own([f"n{plane} = {load}.to(tl.float32)"])
        lines = [self._code(stream, plane, tokens, half) for stream in self.term.layout.streams]
        parts = [(f"c{stream.width}", 0) for stream in self.term.layout.streams]
        meta = self.side.layout.meta
        one = half is not None and meta is not None and meta.tokens % self.plan.half == 0
        block = self.block(half or 0) if one else ""
        lines.append(f"c = {self._numbered(parts)}")
        return self.own([*lines, *self._number(plane, tokens, guard, block)])

    def _code(self, stream: Stream, plane: int, tokens: str, half: int | None) -> str:
        """c<width>: the stream's bits of the codes of a plane, in the low bits of 16."""
        row = tokens if not stream.paired else "pair" if half is not None else "pair_row"
        known, width = self._plane_of(plane), self.term.layout.plane_width
        if known is not None:
            place = stream.places[known]
            at = stream.offset // 2 + place.tile * width
            at += plane * self.width % width
            token, lane = self.grid(row, self.plane_lane(plane) if self.term.dim < self.width else self.lane)
            shift, lane = str(8 * place.byte + place.bit), lane + plus(at)
        else:
            token, lane = self.grid(row, self._at(stream, plane))
            shift = self.grid("", f"{self._at(stream, plane)}_bit")[1]
        if stream.paired:
            second = str(8 * half) if half is not None else self.grid(f"({tokens} % {2 * PAIR} // {PAIR} * 8)", "")[0]
            shift = second if shift == "0" else shift if second == "0" else f"{shift} + {second}"
        mask = self.mask("")
        load = f"tl.load(words + {token}{times(stream.row_words)} + {lane}{f', mask={mask}, other=0' if mask else ''})"
        if shift != "0":
            load = f"({load}.to(tl.int32) >> {f'({shift})' if ' ' in shift else shift})"
        return f"c{stream.width} = ({load} & {2**stream.width - 1}).to(tl.int16)"


class Folded(Planes):
    """A side of bands: its planes are those of the channels that radii and angles become."""

    def __init__(self, plan: Plan, side: SidePlan) -> None:
        width = lanes(side)
        layout = SideLayout(side.row, (), width, _spans(side.row, width), None)
        super().__init__(plan, replace(side, layout=layout, rest=None))
        self.prefix = side.name[0]
        self.lane = f"{self.prefix}_lane"
        self.radii, *self.angles = (Stretch(plan, term, width) for term in side.terms)

    @property
    def mark(self) -> str:
        """Nothing: the side has no other term."""
        return ""

    def own(self, lines: list[str]) -> list[str]:
        """Lines as they are."""
        return lines

    def lane_lines(self) -> list[str]:
        return [*super().lane_lines(), *(line for band in (self.radii, *self.angles) for line in band.given_lines())]

    def load(self, half: int, tokens: str) -> list[str]:
        """Nothing: what a plane needs is loaded where it is made."""
        return []

    def load_tokens(self, tokens: str) -> list[str]:
        paired = any(band.term.layout.paired for band in (self.radii, *self.angles))
        return [f"pair_row = {tokens} // {2 * PAIR} * {PAIR} + {tokens} % {PAIR}"] * paired

    def packed_channels(self, half: int, tokens: str) -> Iterator[tuple[int, list[str]]]:
        """Every plane of channels of sub-tile `half`, and the lines that make it."""
        return self._made(tokens, half, "")

    def edge_channels(self, guard: str = "") -> Iterator[tuple[int, list[str]]]:
        """The same of edge tokens."""
        return self._made("t", None, guard)

    def _made(self, tokens: str, half: int | None, guard: str) -> Iterator[tuple[int, list[str]]]:
        levels = len(self.angles)
        planes = self.radii.side.layout.planes
        for plane in range(planes):
            lines = self.radii.numbers(plane, tokens, half, guard)
            name = self.radii.own([f"n{plane}"])[0]
            yield from self._branch(levels, plane, name, lines, tokens, half, guard)

    def _branch(
        self, level: int, plane: int, radius: str, lines: list[str], tokens: str, half: int | None, guard: str
    ) -> Iterator[tuple[int, list[str]]]:
        """Planes of channels from a plane of radii of one level: one branch after the other, so that few are kept."""
        if level == 0:
            yield plane, [*lines, f"n{plane} = {radius}"] if radius != f"n{plane}" else lines
            return
        band = self.angles[level - 1]
        lines += band.numbers(plane, tokens, half, guard)
        angle = band.own([f"n{plane}"])[0]
        count = band.term.dim
        if count < self.width:  # both halves lie in one plane
            first = self.grid("", f"({self.lane} % {2 * count} < {count})")[1]
            lines.append(f"cosine, sine = cartesian({radius}, {angle})")
            lines.append(f"radius{level} = tl.where({first}, cosine, sine)")
            yield from self._branch(level - 1, plane, f"radius{level}", lines, tokens, half, guard)
            return
        other = plane + count // self.width
        names = (f"n{plane}", f"n{other}") if level == 1 else (f"radius{level}", f"radius{level}_2")
        lines.append(f"{', '.join(names)} = cartesian({radius}, {angle})")
        yield from self._branch(level - 1, plane, names[0], lines, tokens, half, guard)
        yield from self._branch(level - 1, other, names[1], [], tokens, half, guard)


class FoldedKeys(Folded, Keys):
    """The bands of the keys in an attention kernel."""


class FoldedValues(Folded, Values):
    """The bands of the values in an attention kernel."""
