"""The page as a person reads it: which bytes hold what, and which bits of a word hold which channel."""

from __future__ import annotations

from typing import Any

from kvdsl.codes import TRITS

from .layout import Meta, SideLayout, Stream, aligned
from .plan import Plan, SidePlan
from .tiling import PAIR

KINDS = {
    "byte": "8-bit scales",
    "bytes": "16-bit words: scale in the low byte, offset in the high byte",
    "half": "16-bit scales",
    "halves": "32-bit words: scale in the low half, offset in the high half",
    "word": "32-bit scales",
    "words": "32-bit scales, then 32-bit offsets",
}
Stage = tuple[dict[str, Any], list[str]]


def page(plan: Plan) -> Stage:
    """(data, lines) of a plan's page."""
    layout = plan.layout
    sections = [row for side in plan.stored for row in _sections(plan, side)]
    sections.sort(key=lambda row: (row["shared"], row["offset"]))
    streams = {side.path: [_stream(side.layout, s) for s in side.layout.streams] for side in plan.stored}
    wide = max(6, *(len(side.path) for side in plan.stored))
    data = {
        "page_tokens": layout.page_tokens,
        "page_bytes": layout.page_bytes,
        "head_bytes": layout.head_bytes,
        "kv_heads": layout.kv_heads,
        "sections": sections,
        "streams": streams,
        "proof": [{"stream": p.stream, "method": p.method, f"{p.unit}s": p.cases} for p in plan.bijection],
    }
    lines = [
        f"a page holds {layout.page_tokens} tokens of {layout.kv_heads} kv heads in {layout.page_bytes} bytes:",
        f"{layout.kv_heads} heads of {layout.head_bytes} bytes, head h at h*{layout.head_bytes}"
        + (", then what heads share" if layout.page_bytes > layout.kv_heads * layout.head_bytes else ""),
        "",
        f"    byte    bytes  {'side':{wide}s}  holds",
    ]
    for row in sections:
        at = f"{row['offset']:8d} {row['bytes']:8d}  {row['side']:{wide}s}  {row['holds']}"
        lines.append(at + ("  (from the page's start)" if row["shared"] else ""))
    for side in plan.stored:
        for stream in side.layout.streams:
            lines += ["", *_drawn(side, stream)]
    lines += [""] if plan.bijection else []
    for p in plan.bijection:
        told = "every bit of {} is one bit of one code" if p.unit == "bit" else "each of the {} is one code"
        lines.append(f"{told.format(p.stream)}: {p.method}, {p.cases} {p.unit}s")
    return data, lines


def _sections(plan: Plan, side: SidePlan) -> list[dict[str, Any]]:
    layout, part = plan.layout, side.layout
    rows = []
    if side.floats:
        size = layout.page_tokens * side.dim * (4 if side.floats == "fp32" else 2)
        rows.append(_row(side, part.float_offset, size, f"{layout.page_tokens} rows of {side.dim} {side.floats}"))
    if (held := side.factors) is not None:
        rows.append(_row(side, held.offset, 2 * layout.page_tokens * held.rank,
                         f"{held.rank} rows of {layout.page_tokens} fp16"))  # fmt: skip
        vectors = f"{held.blocks} x {held.rank} vectors of {side.dim} fp16; as many for {held.tokens} tokens"
        rows.append(_row(side, held.vectors_offset, 2 * held.blocks * held.rank * side.dim, vectors))
    if (slots := side.slots) is not None:
        rows.append(_row(side, slots.offset, 2 * slots.entries, f"{slots.rows} rows of {slots.width} fp16"))
        rows.append(_row(side, slots.places_offset, slots.entries, f"{slots.rows} rows of {slots.width} places"))
    if (beside := side.beside) is not None:
        size = beside.size(layout.page_tokens)
        rows.append(_row(side, beside.offset, size, beside.rows_of(layout.page_tokens)))
    if (across := side.layout.across) is not None:
        what = "one a token" if across.of_tokens else f"one a channel for {across.tokens} tokens"
        rows.append(_row(side, across.offset, 2 * across.entries, f"{across.entries} fp16 factors of tiles; {what}"))
    if (chosen := side.chosen) is not None:
        which = f"{chosen.blocks} rows of {chosen.count} channels; as many for {chosen.tokens} tokens"
        rows.append(_row(side, chosen.offset, chosen.blocks * chosen.count, which))
    for stream in part.streams:
        last = stream.shift + stream.width - 1
        bits = f"bits {stream.shift} to {last}" if last > stream.shift else f"bit {last}"
        bits = f"{TRITS} ternary digits a byte" if stream.digits else bits
        bits = f"{part.row} bytes a token" if part.row else bits
        what = f"codes, {bits}: {stream.rows} rows of {stream.row_words} words"
        rows.append(_row(side, stream.offset, stream.size, what))
    if part.meta is not None:
        copies = layout.kv_heads // part.meta.heads if part.meta.shared else 1
        rows.append(_row(side, part.meta.offset, part.meta.size * copies, _meta(part.meta), shared=part.meta.shared))
    return rows


def _row(side: SidePlan, offset: int, size: int, holds: str, *, shared: bool = False) -> dict[str, Any]:
    padded = aligned(size) - size
    text = holds + (f", {padded} bytes of padding" if padded else "")
    return {"side": side.path, "offset": offset, "bytes": aligned(size), "holds": text, "shared": shared}


def _meta(meta: Meta) -> str:
    order = "block by block" if meta.group_stride == 1 else "group by group"
    across = f" and {meta.heads} heads" if meta.shared else ""
    tokens = "a token" if meta.tokens == 1 else f"{meta.tokens} tokens"
    share = f"one for {tokens} x {meta.channels} channel{'s' * (meta.channels > 1)}{across}"
    return f"{meta.entries} {KINDS[meta.kind]}; {share}, {order}"


def _stream(part: SideLayout, stream: Stream) -> dict[str, Any]:
    bit = "digit" if stream.digits else "bit"
    places = [{"plane": p.plane, "tile": p.tile, "byte": p.byte, bit: p.bit} for p in stream.places]
    return {
        "width": stream.width,
        "shift": stream.shift,
        "paired": stream.paired,
        "plane_channels": part.code_width,
        "rows": stream.rows,
        "row_words": stream.row_words,
        "planes": places,
    }


def _drawn(side: SidePlan, stream: Stream) -> list[str]:
    """One word of each word tile, highest bit first, with the channel that each run of bits belongs to."""
    wide, size = side.layout.code_width, side.layout.coupled
    codes, step = (f"codes of {size} channels", f"{size}x") if size > 1 else ("channels", "x")
    codes = "bytes of codes" if side.layout.row else codes
    if stream.digits:
        return _drawn_digits(side, wide)
    lines = [
        f"{side.title}, {stream.width}-bit stream: planes of {wide} {codes}; 16-bit words of a tile, x = 0..{wide - 1}",
        f"  row t // 64 * 32 + t % 32: token t in the low byte, token t + {PAIR} in the high byte"
        if stream.paired
        else "  row t: one token",
    ]
    for tile in range(stream.tiles):
        cells = {}
        for place in stream.places:
            if place.tile == tile:
                for byte in (0, 1) if stream.paired else (place.byte,):
                    low = 8 * byte + place.bit
                    cells[low] = f"{place.plane * wide * size}+{step}"
        starts = sorted(cells, reverse=True)
        size = max(map(len, cells.values())) + 1
        bits = [f"{low + stream.width - 1}..{low}" if stream.width > 1 else str(low) for low in starts]
        size = max(size, *(len(b) + 1 for b in bits))
        lines.append(f"  word {tile * wide}+x".ljust(14) + "bit     " + "|".join(b.center(size) for b in bits))
        what = "byte" if side.layout.row else "channel"
        lines.append(" " * 14 + what.ljust(8) + "|".join(cells[low].center(size) for low in starts))
    return lines


def _drawn_digits(side: SidePlan, row: int) -> list[str]:
    """One byte, highest digit first, with the channel of each digit."""
    starts = range(0, side.dim, row)
    cells = [f"{start}+x" for start in starts]
    size = max(map(len, cells)) + 2
    lines = [
        f"{side.title}, ternary digits: rows of {row} bytes a token, x = 0..{row - 1}; "
        "a byte is 256*0.ddddd of base 3, rounded up",
        f"  row t // 64 * 32 + t % 32: token t in the low bytes of words, token t + {PAIR} in the high bytes",
        "  byte x      digit   " + "|".join(str(i).center(size) for i in range(len(starts))),
        "              channel " + "|".join(cell.center(size) for cell in cells),
    ]
    if (whole := len(starts) * row) > side.dim:
        lines[-1] += f"   (below {side.dim}; {whole - side.dim} of {whole} places hold no channel, digit 0)"
    return lines
