"""Reading a side's stored scales in Triton: addresses and decoding of metadata words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .codec import READ
from .plan import SidePlan

if TYPE_CHECKING:
    from .triton_planes import Planes


def section(side: SidePlan, page_bytes: int, head_bytes: int) -> tuple[int, str]:
    """(element size, address of the side's first metadata entry for `page` and `h`, in elements)."""
    meta = side.layout.meta
    assert meta is not None
    size = meta.element
    if meta.shared:
        index = f" + h // {meta.heads} * {meta.entries}"
        return size, f"page * {page_bytes // size} + {meta.offset // size}{index}"
    return size, f"page * {page_bytes // size} + h * {head_bytes // size} + {meta.offset // size}"


def pointer(side: SidePlan) -> str:
    """The pool pointer of the metadata's element type."""
    meta = side.layout.meta
    assert meta is not None
    return f"pool{8 * meta.element}_ptr"


def entry(side: SidePlan, block: str, group: str) -> str:
    """Index of entry (token block, channel group) within the section: both vectors, or one a scalar.  It has the shape
    of what it is built from even where the section has one block or one group."""
    meta = side.layout.meta
    assert meta is not None
    parts = []
    for index, stride, count in ((block, meta.block_stride, meta.blocks), (group, meta.group_stride, meta.groups)):
        if index.isdigit():
            if int(index) * stride:
                parts.append(str(int(index) * stride))
        elif count == 1 and ("lane" in index or "token" in index):
            parts.append(f"{index} * 0" if "//" not in index else index)
        else:
            index = f"({index})" if "//" in index and stride != 1 else index
            parts.append(index if stride == 1 else f"{index} * {stride}")
    return " + ".join(parts) or "0"


def token_entry(side: SidePlan, tokens: str, group: int) -> str:
    """Index of the entry of each of these tokens, for a group of channels."""
    meta = side.layout.meta
    assert meta is not None
    return entry(side, tokens if meta.tokens == 1 else f"{tokens} // {meta.tokens}", str(group))


def read(side: SidePlan, base: str, index: str, scale: str, offset: str, mask: str = "", loaded: str = "") -> list[str]:
    """Lines that load the entry at `base + index` into float32 `scale` and, where there is one, `offset`; `loaded`
    names it where it is there already."""
    meta = side.layout.meta
    assert meta is not None
    where = base if index == "0" else f"{base} + {index}"
    suffix = f", mask={mask}, other=0" if mask else ""
    word = f"{scale}_word"
    lines = []
    if not loaded and len(where) + len(suffix) > 80:
        lines, where = [f"entry = {where}"], "entry"
    load = loaded or f"tl.load({where}{suffix})"
    outer = f" * {side.letter}_outer" if side.second is not None else ""
    whole, low, high = READ[side.scale.dtype]
    if side.has_offset and side.scale.zero_inside:
        mask_bits = 2**side.alphabet.bits - 1
        lines += [f"{word} = {load}", f"{scale} = scale_over_zero_point({word}, {mask_bits})"]
        return [*lines, f"{offset} = ({word} & {mask_bits}).to(tl.float32)"]
    if not side.has_offset or meta.kind == "words":
        lines.append(f"{scale} = {whole}({load}){outer}")
        if meta.kind == "words":
            lines.append(f"{offset} = as_float(tl.load({where} + {meta.total}{suffix})){outer}")
        return lines
    return [*lines, f"{word} = {load}", f"{scale} = {low}({word}){outer}", f"{offset} = {high}({word}){outer}"]


def across(side: SidePlan, tokens: str, lane: str, mask: str = "") -> str:
    """The factors of tiles as float32: of these tokens of the page, or of these channels of these tokens' tile."""
    held = side.layout.across
    assert held is not None
    index = tokens
    if not held.of_tokens:
        tile = tokens if tokens.isdigit() else f"{tokens} // {held.tokens}"
        index = lane if tile == "0" else f"{tile} * {side.dim} + {lane}"
    masked = f", mask={mask}, other=0" if mask else ""
    return f"tl.load({side.letter}_across + {index}{masked}).to(tl.float32)"


def times_across(planes: Planes, plane: int, tokens: str, guard: str) -> list[str]:
    """The line that multiplies decoded numbers by the factors of their tiles, where they have some."""
    held = planes.side.layout.across
    if held is None:
        return []
    token, lane = planes.grid(tokens, planes.plane_lane(plane))
    mask = planes.mask(guard, plane)
    if held.of_tokens:
        mask = planes.grid(guard, "")[0] if guard else ""
    return [f"n{plane} = n{plane} * {across(planes.side, token, lane, mask)}"]


def static_read(planes: Planes, plane: int, lane: str) -> list[str]:
    """Lines that load calibrated scales of one plane's channels into `x_scale` (and `x_offset`)."""
    side = planes.side
    mask = planes.mask("", plane) if "[" in lane else planes.inside(plane)
    other = f", mask={mask}, other=0.0" if mask else ""
    block = side.scale.block
    channels = block.channels if isinstance(block.channels, int) else side.dim
    groups = side.dim // channels
    head = "h" if block.heads == 1 else "0"
    channel = f"({lane} + {planes.start(plane)})" if planes.start(plane) else lane
    group = f"{channel} // {channels}" if channels > 1 else channel
    index = f"{head} * {groups} + {group}" if groups > 1 else f"{head} + {lane} * 0"
    heads = planes.plan.shape.kv_heads if block.heads == 1 else 1
    lines = [f"{planes.prefix}_scale = tl.load({side.label}_scale_ptr + {index}{other})"]
    if side.has_offset:
        lines.append(f"{planes.prefix}_offset = tl.load({side.label}_scale_ptr + {heads * groups} + {index}{other})")
    return lines
