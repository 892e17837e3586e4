"""Scales of groups of channels that are narrower than a plane, in Triton: read once a token and group, not by lanes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .text import plus
from .triton_meta import entry, read

if TYPE_CHECKING:
    from .triton_planes import Planes


def side_by_side(planes: Planes) -> bool:
    """Whether a plane has whole groups of channels, each token a scale for each."""
    meta, width = planes.side.layout.meta, planes.width
    if meta is None or planes.ragged or width & (width - 1):
        return False
    return meta.tokens == 1 < meta.channels and width % meta.channels == 0


def of_groups(planes: Planes, plane: int, tokens: str, guard: str) -> list[str]:
    """Lines that read what is stored of a plane's groups, and give it to all of their channels."""
    side, meta = planes.side, planes.side.layout.meta
    assert meta is not None
    first = plus(planes.start(plane) // meta.channels)
    token, group = planes.grid(tokens, f"(tl.arange(0, {planes.width // meta.channels}){first})")
    mask = planes.grid(guard, "")[0] if guard else ""
    lines = read(side, planes.meta, entry(side, token, group), planes.scale, planes.offset, mask=mask)
    spread = "over_rows" if planes.transposed else "over_columns"
    given = [planes.scale, *([planes.offset] if side.has_offset else [])]
    return [*lines, *(f"{name} = {spread}({name}, {meta.channels})" for name in given)]
