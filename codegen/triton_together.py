"""A tile's stored numbers that come by one load, in Triton.

What one number a token takes is 32 or 64 times one or two bytes, what the channels of a plane share with a block of
tokens 16 or 32 times two or four: less than the sixteen bytes a lane that one copy takes, or even than the four that
can be asked for ahead of time, so that the loop would wait.  Numbers that stand side by side in the page come at once,
and are taken apart behind the load, which reads of shared memory what each product needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .tiling import AHEAD
from .triton_abreast import in_columns
from .triton_meta import entry, read, token_entry

if TYPE_CHECKING:
    from .triton_planes import Planes

DEAR = ("e4m3",)  # what takes several instructions each, if it is a byte of its own: the four lanes of a product's row
# would all do them (`nvfp4`, sm_90: 2,374 instructions a tile, 3,265 at once)


def _span(planes: Planes) -> int:
    """How many sub-tiles' numbers come at once: one, or all where one's are too few to be asked for ahead of time;
    0 where every group's come alone."""
    side, plan, meta = planes.side, planes.plan, planes.side.layout.meta
    if meta is None or plan.masked or plan.abreast:
        return 0
    if meta.tokens > 1 or meta.kind == "words" or side.scale.dtype in DEAR and not side.has_offset:
        return 0
    span = 1 if meta.groups * plan.half * meta.element >= AHEAD else plan.halves
    pieces = meta.groups * span
    beside = meta.block_stride == 1 and meta.group_stride % plan.half == 0
    beside = beside and (meta.group_stride % plan.tile == 0 or span == 1)
    return span if pieces > 1 and _power(pieces) and beside else 0


def together(planes: Planes) -> bool:
    """Whether several groups' numbers come at once."""
    return _span(planes) > 0


def load_together(planes: Planes, half: int) -> list[str]:
    """Lines before a sub-tile that load what its tokens and those of the next ones have stored, where that comes at
    once, and take it apart: a vector a group and sub-tile."""
    span, plan, meta = _span(planes), planes.plan, planes.side.layout.meta
    if not span or half % span:
        return []
    assert meta is not None
    tokens = plan.half * span
    at = f"tl.arange(0, {meta.groups * tokens})"
    if meta.groups > 1 and meta.group_stride > tokens:
        at = f"{at} // {tokens} * {meta.group_stride} + {at} % {tokens}"
    first = "" if meta.group_stride == tokens else " + page_token"
    first += f" + {half * plan.half}" if half else ""
    whole = f"{planes.prefix}_stored"
    return [f"{whole} = tl.load({planes.meta}{first} + {at})", *cut(whole, meta.groups * span)]


def read_group(planes: Planes, group: int, half: int, tokens: str) -> list[str]:
    """Lines that make scales and offsets of what is stored of one group, of the tokens of one sub-tile."""
    span = _span(planes)
    loaded = piece(f"{planes.prefix}_stored", group * span + half % span, 1) if span else ""
    index = token_entry(planes.side, tokens, group)
    if planes.plan.abreast:
        loaded = in_columns(f"tl.load({planes.meta} + {index})")
    return read(planes.side, planes.meta, index, planes.scale, planes.offset, mask=planes.guard, loaded=loaded)


def read_plane(planes: Planes, plane: int, half: int) -> list[str]:
    """Lines that make scales and offsets of what is stored of a plane's channels and the token block of a sub-tile."""
    side, layout, meta = planes.side, planes.side.layout, planes.side.layout.meta
    assert meta is not None
    block, names = planes.block(half), (planes.scale, planes.offset)
    index = entry(side, block, planes.channel_group(plane))
    whole = meta.channels == 1 and not any(planes.inside(j) for j in range(layout.planes))
    whole = whole and meta.kind != "words" and side.scale.dtype not in DEAR
    if not whole or layout.planes == 1 or not _power(layout.planes):
        return read(side, planes.meta, index, *names, mask=planes.inside(plane))
    name, lines = f"{planes.prefix}_stored", list[str]()
    if plane == 0:
        at = entry(side, block, f"tl.arange(0, {layout.planes * planes.width})")
        lines = [f"{name} = tl.load({planes.meta} + {at})", *cut(name, layout.planes)]
    return [*lines, *read(side, planes.meta, index, *names, loaded=piece(name, plane, 1))]


def cut(whole: str, pieces: int, function: str = "halves") -> list[str]:
    """Lines that cut a vector, or what else the function cuts into two, into equal pieces."""
    lines, named = [], [(whole, 0, pieces)]
    while named[0][2] > 1:
        parts = []
        for name, first, count in named:
            half = count // 2
            two = [(piece(whole, first + i * half, half), first + i * half, half) for i in range(2)]
            lines.append(f"{two[0][0]}, {two[1][0]} = {function}({name})")
            parts += two
        named = parts
    return lines


def piece(whole: str, first: int, count: int) -> str:
    """What one of the pieces is called, or several side by side."""
    return f"{whole}{first}{f'_{first + count - 1}' if count > 1 else ''}"


def _power(count: int) -> bool:
    return count & (count - 1) == 0
