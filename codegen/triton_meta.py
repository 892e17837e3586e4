"""Reading a side's stored scales in Triton: addresses and decoding of metadata words."""

from __future__ import annotations

from .plan import SidePlan


def section(side: SidePlan, page_bytes: int, head_bytes: int) -> tuple[int, str]:
    """(element size, address of the side's first metadata entry for `page` and `h`, in elements)."""
    meta = side.layout.meta
    assert meta is not None
    size = 2 if meta.kind == "half" else 4
    if meta.shared:
        index = f" + h // {meta.heads} * {meta.entries}"
        return size, f"page * {page_bytes // size} + {meta.offset // size}{index}"
    return size, f"page * {page_bytes // size} + h * {head_bytes // size} + {meta.offset // size}"


def pointer(side: SidePlan) -> str:
    """The pool pointer of the metadata's element type."""
    meta = side.layout.meta
    assert meta is not None
    return "pool16_ptr" if meta.kind == "half" else "pool32_ptr"


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


def read(side: SidePlan, base: str, index: str, scale: str, offset: str, mask: str = "") -> list[str]:
    """Lines that load the entry at `base + index` into float32 `scale` and, where there is one, `offset`."""
    meta = side.layout.meta
    assert meta is not None
    where = base if index == "0" else f"{base} + {index}"
    suffix = f", mask={mask}, other=0" if mask else ""
    bf16 = "_bf16" if side.scale.dtype == "bf16" else ""
    word = f"{scale}_word"
    lines = []
    if len(where) + len(suffix) > 80:
        lines, where = [f"entry = {where}"], "entry"
    if meta.kind == "half":
        return [*lines, f"{scale} = half{bf16}(tl.load({where}{suffix}))"]
    if meta.kind == "halves":
        return [
            *lines,
            f"{word} = tl.load({where}{suffix})",
            f"{scale} = low_half{bf16}({word})",
            f"{offset} = high_half{bf16}({word})",
        ]
    if side.has_offset and meta.kind == "word":
        mask_bits = 2 ** (side.code.bits or 0) - 1
        return [
            *lines,
            f"{word} = tl.load({where}{suffix})",
            f"{scale} = scale_over_zero_point({word}, {mask_bits})",
            f"{offset} = ({word} & {mask_bits}).to(tl.float32)",
        ]
    lines.append(f"{scale} = as_float(tl.load({where}{suffix}))")
    if meta.kind == "words":
        lines.append(f"{offset} = as_float(tl.load({where} + {meta.total}{suffix}))")
    return lines
