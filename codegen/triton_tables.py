"""Codes that are looked up, in Triton: the expressions that take a plane's entries out of words by table or by bits.

A place in words is (name, bit): the code begins at that bit of the 16-bit words of that name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .alphabet import packed_table
from .codec import given
from .plan import SidePlan

if TYPE_CHECKING:
    from .triton_planes import Planes

Part = tuple[str, int]


def look_up(side: SidePlan, parts: Sequence[Part], registers: Sequence[str], *, alone: bool = False) -> str:
    """The 16-bit entry of each code of one plane; `parts` are its places in each stream."""
    streams, given = side.layout.streams, ", ".join([*registers, *["True"] * alone])
    (name, bit), *rest = parts
    place = bit // streams[0].width
    if len(streams) == 1 and streams[0].width == 1:
        return f"table4(field({name}, {bit}, 0, 1), 0, {given})"
    if not rest:
        return f"table{2 ** streams[0].width}({name}, {place}, {given})"
    (lowest, bit), apart = rest[0], 8 if streams[0].paired else 4  # bits from one byte's codes to the other's
    bit -= place % 4 + place // 4 * apart
    if apart == 8:
        text = f"field({lowest}, {bit}, 0, {0x0F0F})"
    else:
        moved = f"{max(0, bit - 4)}, {max(0, 4 - bit)}"
        text = f"both(field({lowest}, {bit}, 0, {0x0F}), field({lowest}, {moved}, {0x0F00}))"
    return f"table8({name}, {text}, {place}, {given})"


def small_floats(side: SidePlan, part: Part) -> str:
    """The float16 numbers of one plane's small floats, but for a power of two."""
    small = side.alphabet.small
    assert small is not None
    if small.converted:
        return f"{small.name}_halves({part[0]}, HIGH={part[1] > 7}, NAN={side.store.measure is None})"
    name, bit = of_byte(part)
    sizes, sign = 10 - small.mantissa - bit, 16 - side.alphabet.bits - bit
    low, high = (2 ** (side.alphabet.bits - 1) - 1) << (sizes + bit), -(2**15)
    if sizes == sign:
        text = f"field({name}, 0, {sizes}, {high | low})"
    else:
        text = f"both(field({name}, 0, {sizes}, {low}), field({name}, 0, {sign}, {high}))"
    return f"{text}.to(tl.float16, bitcast=True)"


def of_byte(part: Part) -> Part:
    """The same place in the byte that holds it, which stands in the low half of words of another name."""
    name, bit = part
    return name + "_high" * (bit > 7), bit % 8


def joined(side: SidePlan, parts: Sequence[Part]) -> str:
    """The codes of one plane, whole numbers."""
    pieces = []
    for stream, (name, bit) in zip(side.layout.streams, map(of_byte, parts), strict=True):
        kept = f"(({name} >> {bit}) & {2**stream.width - 1})" if bit else f"({name} & {2**stream.width - 1})"
        pieces.append(f"({kept} << {stream.shift})" if stream.shift else kept)
    return f"({' | '.join(pieces)})" if len(pieces) > 1 else pieces[0]


def registers(planes: Planes) -> list[str]:
    """Lines that put a table of the parameters into registers, as `packed_table` does one that is known: what a product
    reads, and the halves of the levels themselves."""
    lines, prefix = [], planes.prefix
    count = 2**planes.side.alphabet.bits
    names = given(planes.side, "levels")
    levels = [f"{prefix}_{names[min(i, count - 1)]}" for i in range(max(4, count))]
    for name, bits, shifts in (("half", "half_bits", (0, 8)), ("high", "as_int", (16, 24)), ("low", "as_int", (0, 8))):
        words = [f"{prefix}_{name}_bits{i}" for i in range(len(levels))]
        lines += [f"{word} = {bits}({level})" for word, level in zip(words, levels, strict=True)]
        for row, shift in enumerate(shifts):
            for i in range(0, len(words), 4):
                register = f"{prefix}_{name}{row * len(words) // 4 + i // 4}"
                lines.append(f"{register} = four_bytes({', '.join(words[i : i + 4])}, {shift})")
    return lines


def known(planes: Planes, name: str, entries: tuple[int, ...]) -> list[str]:
    """The registers of a table: numbers, or those that the parameters' levels were put into."""
    alphabet = planes.side.alphabet
    if not alphabet.given:
        return list(map(str, packed_table(entries)))
    return [f"{planes.prefix}_{name}{i}" for i in range(max(4, 2**alphabet.bits) // 2)]
