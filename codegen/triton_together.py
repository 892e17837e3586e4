"""A tile's stored numbers that come by one load, in Triton.

What one number a token takes is 32 or 64 times one or two bytes: less than the four bytes a lane that can be asked for
ahead of time, so that the loop would wait for each.  All groups' numbers of a tile stand side by side in the page, and
are taken apart behind the load, which reads of shared memory what each product needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .triton_meta import read, token_entry

if TYPE_CHECKING:
    from .triton_planes import Planes

WIDEST = 2  # bytes of a stored number; of more, a lane's are enough
DEAR = ("e4m3",)  # what takes several instructions each: here the four lanes of a product's row would all do them


def together(planes: Planes) -> bool:
    """Whether the stored numbers of a tile come at once."""
    side, plan, meta = planes.side, planes.plan, planes.side.layout.meta
    if meta is None or meta.tokens > 1 or meta.element > WIDEST or side.scale.dtype in DEAR:
        return False
    pieces = side.groups * plan.halves
    beside = meta.block_stride == 1 and meta.group_stride % plan.tile == 0
    return pieces > 1 and pieces & (pieces - 1) == 0 and meta.groups == side.groups and beside


def load_together(planes: Planes, half: int) -> list[str]:
    """Lines before the first sub-tile that load them all, where they come at once, and take them apart: a vector a
    group and sub-tile."""
    if half or not together(planes):
        return []
    plan, meta, whole = planes.plan, planes.side.layout.meta, f"{planes.prefix}_stored"
    assert meta is not None
    at = f"tl.arange(0, {meta.groups * plan.tile})"
    if meta.groups > 1 and meta.group_stride > plan.tile:
        at = f"{at} // {plan.tile} * {meta.group_stride} + {at} % {plan.tile}"
    begin = "" if meta.group_stride == plan.tile else " + page_token"
    lines = [f"{whole} = tl.load({planes.meta}{begin} + {at})"]
    named = [(whole, 0, meta.groups * plan.halves)]
    while named[0][2] > 1:
        parts = []
        for name, first, count in named:
            half = count // 2
            two = [(_name(planes, first + i * half, half), first + i * half, half) for i in range(2)]
            lines.append(f"{two[0][0]}, {two[1][0]} = halves({name})")
            parts += two
        named = parts
    return lines


def read_group(planes: Planes, group: int, half: int, tokens: str) -> list[str]:
    """Lines that make scales and offsets of what is stored of one group, of the tokens of one sub-tile."""
    loaded = _name(planes, group * planes.plan.halves + half, 1) if together(planes) else ""
    index = token_entry(planes.side, tokens, group)
    return read(planes.side, planes.meta, index, planes.scale, planes.offset, loaded=loaded)


def _name(planes: Planes, first: int, count: int) -> str:
    return f"{planes.prefix}_stored{first}{f'_{first + count - 1}' if count > 1 else ''}"
