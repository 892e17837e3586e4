"""Blocks of numbers in a pack kernel: how each kind is visited, and what is folded over it.

Whatever a scale is made from (extremes, sums, products with levels, squared errors) is a fold over the numbers of its
block.  A block knows how to visit its numbers; a fold says what is taken of each and how two of them are joined.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .codec import call, clips, counted, counted_numbers, numbers, searched, settled, statistics, sums, tried
from .plan import SidePlan
from .text import Lines, literal

if TYPE_CHECKING:
    from .triton_pack import Pack

# what a fold starts from, its type, how it is reduced within a tile and joined to what was there
KINDS = {
    "low": ("65504.0", "tl.float32", "tl.min", "tl.minimum({}, {})"),
    "high": ("-65504.0", "tl.float32", "tl.max", "tl.maximum({}, {})"),
    "top": ("0.0", "tl.float32", "tl.max", "tl.maximum({}, {})"),
    "spoilt": ("0", "tl.int32", "tl.max", "tl.maximum({}, {})"),
    "reach": ("0", "tl.int32", "tl.sum", "{} + {}"),
    "sum": ("0.0", "tl.float64", "tl.sum", "{} + {}"),
}
OF = {
    "low": ("lowest({x}, {inside})", "finite({x})"),
    "high": ("highest({x}, {inside})", "finite({x})"),
    "top": ("top_of({x})", "top_of({x})"),
    "spoilt": ("above_infinity({x})", "above_infinity({x})"),
    "squares": ("square({x})", "square({x})"),
    "sizes": ("magnitude({x})", "magnitude({x})"),
}  # where a mask says which numbers count, the others being 0, and where all of them do
RAW = {
    "low": ("tl.where({inside}, {x}, 65504.0)", "{x}"),
    "high": ("tl.where({inside}, {x}, -65504.0)", "{x}"),
    "top": ("tl.abs({x})", "tl.abs({x})"),
}  # of numbers that are not made finite


@dataclass(frozen=True)
class Fold:
    """Accumulators by name; `taken` gives lines, and the value of each accumulator, of a tile of numbers and the mask
    of those that count.  `raw`: numbers are not made finite, and the largest one is NaN where any is."""

    names: Sequence[str]
    taken: Callable[[str, str], tuple[list[str], list[str]]]
    raw: bool = False

    def kind(self, name: str) -> tuple[str, str, str, str]:
        start, kind, reduce, joined = KINDS.get(name, KINDS["sum"])
        return (
            (start, kind, "largest", "larger({}, {})")
            if self.raw and reduce == "tl.max"
            else (start, kind, reduce, joined)
        )


class Block:
    """Blocks of one kind.

    axes     of a tile that one block spans within it
    shape    of the accumulators: one number a block
    column   index that spreads them over a tile
    """

    axes: tuple[int, ...]
    shape: str
    column: str
    in_registers = False

    def __init__(self, pack: Pack) -> None:
        self.pack = pack

    def fold(self, fold: Fold) -> list[str]:
        """Lines that fold all numbers of each block."""
        out = Lines()
        for name in fold.names:
            start, kind, _, _ = fold.kind(name)
            out.add(f"{name} = tl.full({self.shape}, {start}, {kind})")
        with self.visited(out) as tiles:
            for x, inside in tiles:
                self._join(out, fold, x, inside)
        return out.lines

    def visited(self, out: Lines) -> Visit:
        """Tiles of numbers and their masks, within the loop that brings them."""
        raise NotImplementedError

    def counted(self, plane: int) -> str:
        """The mask of a plane's numbers that count: without that of tokens where these stay apart, or are all there."""
        return self.pack.mask(self.pack.inside_t if 0 in self.axes else "", plane)

    def _reduced(self, fold: Fold, name: str, value: str) -> str:
        """The value of a tile of numbers as one number a block."""
        for axis in self.axes:
            value = f"{fold.kind(name)[2]}({value}, {axis})"
        return value

    def _join(self, out: Lines, fold: Fold, x: str, inside: str) -> None:
        lines, values = fold.taken(x, inside)
        out.extend(lines)
        for name, value in zip(fold.names, values, strict=True):
            out.add(f"{name} = {fold.kind(name)[3].format(name, self._reduced(fold, name, value))}")


class Visit:
    """A loop around lines, or none."""

    def __init__(
        self, out: Lines, heads: Sequence[str], lines: Sequence[str], tiles: Iterator[tuple[str, str]]
    ) -> None:
        self.out, self.heads, self.lines, self.tiles = out, heads, lines, tiles

    def __enter__(self) -> Iterator[tuple[str, str]]:
        self.out.add(*self.heads)
        self.out.depth += len(self.heads)
        self.out.add(*self.lines)
        return self.tiles

    def __exit__(self, *error: object) -> None:
        self.out.depth -= len(self.heads)


class InPlanes(Block):
    """A block is planes of a tile that are in registers: x0, x1, ..."""

    in_registers = True

    def __init__(self, pack: Pack, members: Sequence[int]) -> None:
        super().__init__(pack)
        self.members = members
        if pack.apart:
            self.axes, self.shape, self.column = (0,), f"[{pack.lanes}]", "[None, :]"
        elif pack.single:
            self.axes, self.shape, self.column = (1,), f"[{pack.tokens}]", "[:, None]"
        else:
            self.axes, self.shape, self.column = (1, 0), "[1]", "[:, None]"

    def fold(self, fold: Fold) -> list[str]:
        """Planes are joined number by number, so that one tile alone is reduced."""
        out = Lines()
        for i, j in enumerate(self.members):
            lines, values = fold.taken(f"x{j}", self.counted(j))
            out.extend(lines)
            for name, value in zip(fold.names, values, strict=True):
                value = fold.kind(name)[3].format(name, value) if i else value
                if j == self.members[-1]:
                    value = self._reduced(fold, name, value)
                    value = f"{value} + tl.zeros([1], {fold.kind(name)[1]})" if self.axes == (1, 0) else value
                out.add(f"{name} = {value}")
        return out.lines


class Given(Block):
    """One number a token that came with the row, summed before the vector was mapped."""

    def __init__(self, pack: Pack) -> None:
        super().__init__(pack)
        self.column = "[:, None]"

    def fold(self, fold: Fold) -> list[str]:
        squares = "squares = tl.load(squares_ptr + bh.to(tl.int64) * total_rows + row, mask=inside, other=0.0)"
        return [squares, "spoilt = nan(squares)"]


class OverHeads(Block):
    """A block spans all channels of several heads, which are read once more for every fold."""

    def __init__(self, pack: Pack) -> None:
        super().__init__(pack)
        self.axes, self.shape = ((1,), f"[{pack.tokens}]") if pack.single else ((1, 0), "[1]")
        self.column = "[:, None]"

    def visited(self, out: Lines) -> Visit:
        pack, meta = self.pack, self.pack.side.layout.meta
        assert meta is not None
        head = f"for head in range(h // {meta.heads} * {meta.heads}, (h // {meta.heads} + 1) * {meta.heads}):"
        other = f"other = source + (head - h) * total_rows * {pack.side.stride}"

        def tiles() -> Iterator[tuple[str, str]]:
            for j in range(pack.side.layout.planes):
                out.add(f"x = {pack.loaded('other', j)}")
                yield "x", self.counted(j)

        return Visit(out, [head], [other], tiles())


class Walked(Block):
    """Each lane of a plane walks the group of channels that it belongs to."""

    def __init__(self, pack: Pack, plane: int) -> None:
        super().__init__(pack)
        self.plane = plane
        self.axes, self.shape, self.column = (), f"[{pack.tokens}, {pack.lanes}]", ""
        if not pack.single:
            self.axes, self.shape, self.column = (0,), f"[{pack.lanes}]", "[None, :]"

    def visited(self, out: Lines) -> Visit:
        pack, meta = self.pack, self.pack.side.layout.meta
        assert meta is not None
        lane, inside = f"({pack.lane} + {pack.start(self.plane)})", pack.mask(pack.inside_t, self.plane)
        near = f"({lane} // {meta.channels} * {meta.channels} + near - {pack.lane})[None, :]"
        load = f"x = tl.load(source + {near}{f', mask={inside}, other=0.0' if inside else ''})"
        return Visit(out, [f"for near in range(0, {meta.channels}):"], [load], iter([("x", self.counted(self.plane))]))


def measured(side: SidePlan, block: Block) -> list[str]:
    """Lines from the numbers of blocks to what is stored of them, and whether a NaN spoilt them."""
    out = Lines()
    if not settled(side):
        out.extend(block.fold(_statistics([*statistics(side), "spoilt"], OF)))
    if side.scale.quantile is not None:
        out.extend(_bounded(side, block))
    if not searched(side):
        out.extend(_candidate(side, block, ""))
        return out.lines
    for i, clip in enumerate(clips(side)):
        out.extend(_candidate(side, block, literal(clip)))
        out.extend(block.fold(_masked(side, block, "loss", [*tried(side), *counted(side)], ["error"])))
        error = "narrow(error)"
        if i == 0:
            out.add(f"least = {error}", *(f"best_{name} = {name}" for name in tried(side)))
            continue
        out.add(f"closer = {error} < least", f"least = tl.where(closer, {error}, least)")
        out.add(*(f"best_{name} = tl.where(closer, {name}, best_{name})" for name in tried(side)))
    out.add(*(f"{name} = best_{name}" for name in tried(side)))
    return out.lines


def _bounded(side: SidePlan, block: Block) -> list[str]:
    """Lines that bring extremes within the size at a quantile: the largest float32 number that so many sizes reach,
    found bit by bit, as positive numbers are in the order of their bits."""
    size = "tl.abs({})" if settled(side) else "top_of({})"
    taken = "(" + size + ".to(tl.int32, bitcast=True) >= bound" + block.column + ").to(tl.int32)"
    count = counted_numbers(side)
    reach = Fold(["reach"], lambda x, inside: ([], [_counted_where(taken.format(x), inside)]))
    out = Lines()
    out.add(f"bound = tl.full({block.shape}, 0, tl.int32)")
    with out.deeper("for bit in range(0, 31):"):
        out.add("bound = bound | (1 << (30 - bit))")
        out.extend(block.fold(reach))
        out.add(f"bound = tl.where(reach < {count - side.scale.bounding(count)}, bound ^ (1 << (30 - bit)), bound)")
    out.add("bound = as_float(bound)")
    lines = {"low": "low = tl.maximum(low, -bound)", "high": "high = tl.minimum(high, bound)", "top": "top = bound"}
    out.add(*(lines[name] for name in statistics(side)))
    return out.lines


def _counted_where(value: str, inside: str) -> str:
    return f"tl.where({inside}, {value}, 0)" if inside else value


def settle(side: SidePlan, blocks: Mapping[str, InPlanes], *, halves: bool) -> list[str]:
    """Lines that fold the extremes of blocks' numbers as they come, float16 or as float32, and make all finite where
    that shows any that are not.  The mark of a block ends the names of what is measured of it."""
    names, out = statistics(side), Lines()
    fold, clean = _statistics(names, RAW, raw=True), "finite_halves" if halves else "finite"
    most, folds = "", {}
    for mark, block in blocks.items():
        folds[mark] = [re.sub(r"\b(low|high|top)\b", rf"\g<1>{mark}", line) for line in block.fold(fold)]
        out.extend([] if halves else [f"x{j} = x{j}.to(tl.float32)" for j in block.members])
        out.extend([*folds[mark], f"spoilt{mark} = nan({names[-1]}{mark})"])
        top = f"top{mark}" if names == ["top"] else f"larger(high{mark}, -low{mark})"
        out.add(f"most = {f'larger(most, {top})' if most else top}")
        most = "most"
    with out.deeper("if odd(most):"):
        for mark, block in blocks.items():
            out.extend([f"x{j} = {clean}(x{j})" for j in block.members] + folds[mark])
    return out.lines


def _statistics(names: Sequence[str], of: Mapping[str, tuple[str, str]], *, raw: bool = False) -> Fold:
    """What is measured of numbers."""
    return Fold(names, lambda x, inside: ([], [of[name][not inside].format(x=x, inside=inside) for name in names]), raw)


def _candidate(side: SidePlan, block: Block, clip: str) -> list[str]:
    """Lines that measure blocks under one clip, and fit a second scale where there is one."""
    measure = call(side, "measure", [*statistics(side), *counted(side), *([clip] if clip else [])])
    lines = [f"{', '.join(numbers(side))} = {measure}"]
    if side.scale.refit:
        lines += block.fold(_masked(side, block, "products", numbers(side), sums(side)))
        lines.append(f"fitted = {call(side, 'refit', ['scale', *sums(side)])}")
    return lines


def _masked(side: SidePlan, block: Block, function: str, under: Sequence[str], names: Sequence[str]) -> Fold:
    """Sums of what a function of the side gives for each number under the block's stored numbers."""

    def taken(x: str, inside: str) -> tuple[list[str], list[str]]:
        made = [f"each{i}" for i in range(len(names))]
        text = call(side, function, [x, *(f"{name}{block.column}" for name in under)])
        return [f"{', '.join(made)} = {text}"], [f"tl.where({inside}, {one}, 0.0)" if inside else one for one in made]

    return Fold(names, taken)
