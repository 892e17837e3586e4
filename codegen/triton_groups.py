"""Scales of groups of channels that are narrower than a plane, in Triton: read once a token and group, not by lanes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .text import plus
from .triton_meta import entry, read
from .triton_tables import small_floats

if TYPE_CHECKING:
    from .triton_planes import Planes


def side_by_side(planes: Planes) -> bool:
    """Whether a plane has whole groups of channels, each token a scale for each."""
    meta, width = planes.side.layout.meta, planes.width
    if meta is None or planes.ragged or width & (width - 1):
        return False
    full = meta.groups * meta.channels % width == 0  # a stretch of few channels leaves lanes of its plane idle
    return meta.tokens == 1 < meta.channels and width % meta.channels == 0 and full


UNIT = 7
"""Numbers in halves are 2**-UNIT of what they are: 448 * 2**UNIT is a float16, and so is the least product, 2**-10 of
it."""


def in_halves(planes: Planes) -> bool:
    """Whether a code times its scale is a float16 number, so that both are multiplied as such: e2m1 under e4m3, of
    which a product has six bits."""
    side = planes.side
    exact = side.scale.dtype == "e4m3" and side.second is None if side.store.measure is not None else False
    small = side.alphabet.small is not None and side.alphabet.small.name == "e2m1"
    return exact and small and not side.polar and side.rope is None and side_by_side(planes)


def halves(planes: Planes, plane: int, parts: list[tuple[str, int]], tokens: str) -> list[str]:
    """n<plane>: one plane of loaded words, decoded, in float16, over 2**UNIT."""
    name, side = planes.scale, planes.side
    assert side.alphabet.small is not None
    lines = _groups(planes, plane, tokens, "")
    lines.append(f"{name} = ({name} * {2.0**UNIT}).to(tl.float16)")  # the code's own unit is 2**-14
    lines.append(f"{name} = {_spread(planes)}({name}, {_channels(planes)})")
    return [*lines, f"n{plane} = {small_floats(side, *parts)} * {name}"]


def of_groups(planes: Planes, plane: int, tokens: str, guard: str) -> list[str]:
    """Lines that read what is stored of a plane's groups, and give it to all of their channels."""
    given = [planes.scale, *([planes.offset] if planes.side.has_offset else [])]
    spread = [f"{name} = {_spread(planes)}({name}, {_channels(planes)})" for name in given]
    return [*_groups(planes, plane, tokens, guard), *spread]


def _spread(planes: Planes) -> str:
    return "over_rows" if planes.transposed else "over_columns"


def _channels(planes: Planes) -> int:
    meta = planes.side.layout.meta
    assert meta is not None
    return meta.channels


def _groups(planes: Planes, plane: int, tokens: str, guard: str) -> list[str]:
    """Lines that read what is stored of a plane's groups."""
    side, meta = planes.side, planes.side.layout.meta
    assert meta is not None
    first = plus(planes.start(plane) // meta.channels)
    token, group = planes.grid(tokens, f"(tl.arange(0, {planes.width // meta.channels}){first})")
    mask = planes.grid(guard, "")[0] if guard else ""
    return read(side, planes.meta, entry(side, token, group), planes.scale, planes.offset, mask=mask)
