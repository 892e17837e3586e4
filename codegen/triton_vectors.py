"""Codes of vectors in Triton: the nearest entry of a table, and its numbers looked up again.

The channels that share a code lie in planes of their own, whose lanes are the codes of one plane of words: lane x of
plane i of these is channel x * channels + i.  An entry's numbers are float16, two or four of them in a word of the
table, which is read where it lies: tables of all groups of channels are tens of kilobytes a head, more than registers
hold, and stay in the cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .plan import SidePlan
from .text import Lines, plus
from .triton_tables import Part, joined

if TYPE_CHECKING:
    from .triton_pack import Pack
    from .triton_planes import Planes


def word_halves(side: SidePlan) -> int:
    """Numbers in a word of the table."""
    return min(4, side.layout.coupled)


def words(side: SidePlan) -> int:
    """Words of an entry."""
    return side.layout.coupled // word_halves(side)


def first_channel(planes: Planes) -> str:
    """The name of the first channel of each lane's group; where channels share no code, of the lanes themselves."""
    return f"{planes.prefix}_channel" if planes.side.alphabet.vectors else planes.lane


def table_lines(planes: Planes) -> list[str]:
    """The lines that say where the tables of the groups of a plane of words begin, and which channel each lane's group
    begins with."""
    side, layout, prefix = planes.side, planes.side.layout, planes.prefix
    entries = side.alphabet.count * words(side)
    return [
        f"{first_channel(planes)} = {planes.lane} * {layout.coupled}",
        f"{prefix}_vectors = {side.label}_table_ptr + (h * {layout.codes} + {planes.lane}) * {entries}",
    ]


def _first(planes: Planes, plane: int) -> str:
    """What the tables of a plane are apart from those of the first."""
    side = planes.side
    return plus(plane // side.layout.coupled * planes.width * side.alphabet.count * words(side))


def looked_up(planes: Planes, plane: int, parts: list[Part]) -> list[str]:
    """c = the numbers of one plane of channels, float32; words of the table come with the first that are in them."""
    side, prefix = planes.side, planes.prefix
    number = plane % side.layout.coupled
    word, half = divmod(number, word_halves(side))
    lines = []
    if number == 0:
        code = f"{joined(side, parts)}.to(tl.int32)"
        code = f"{code} * {words(side)}" if words(side) > 1 else code
        lines.append(f"{prefix}_at = {planes.grid('', f'{prefix}_vectors')[1]}{_first(planes, plane)} + {code}")
    if half == 0:
        mask = planes.mask("")
        lines.append(f"{prefix}_word = tl.load({prefix}_at{plus(word)}{f', mask={mask}, other=0' if mask else ''})")
    return [*lines, f"c = half_of({prefix}_word, {half})"]


def encode_name(side: SidePlan) -> str:
    """The function that finds codes."""
    return f"encode_{side.label}"


def encode(side: SidePlan) -> str:
    """The text of the function that gives the codes of a plane of groups: x0, x1, ... are the numbers of each channel
    of a group [tokens, groups], `vectors` says where the tables of the groups begin."""
    out, count = Lines(), side.layout.coupled
    numbers = [f"x{i}" for i in range(count)]
    out.add("@triton.jit")
    with out.deeper(f"def {encode_name(side)}({', '.join(numbers)}, vectors, inside):"):
        out.add('"""The code of the nearest vector, the first of several, int32."""')
        out.add(*(f"{name} = finite({name}.to(tl.float32))" for name in numbers))
        out.add("least = tl.full(x0.shape, float('inf'), tl.float32)", "c = tl.zeros(x0.shape, tl.int32)")
        with out.deeper(f"for code in range({side.alphabet.count}):"):
            for i in range(count):
                word, half = divmod(i, word_halves(side))
                if half == 0:
                    out.add(f"word = tl.load(vectors + (code * {words(side)} + {word}), mask=inside, other=0)")
                out.add(f"apart = x{i} - half_of(word, {half})[None, :]")
                out.add(f"far = {'far + ' if i else ''}apart * apart")
            out.add("c = tl.where(far < least, code, c)", "least = tl.minimum(far, least)")
        out.add("return c")
    return str(out)


def coded(pack: Pack, body: Lines) -> None:
    """Lines from rows to codes in their words, a plane of words at a time."""
    side, count = pack.side, pack.side.layout.coupled
    for first in range(0, side.layout.planes, count):
        pack.load_planes(body, range(first, first + count))
        inside = f"{pack.lane} < {pack.width}"
        numbers = ", ".join(f"x{j}" for j in range(first, first + count))
        at = f"{pack.prefix}_vectors{_first(pack, first)}"
        body.add(f"c = {encode_name(side)}({numbers}, {at}, {inside})")
        pack.put(body, first)
