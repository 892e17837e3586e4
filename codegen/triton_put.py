"""Bytes that are made in torch, put into pages: a row of them for every few tokens of a head."""

from __future__ import annotations

from .plan import Plan
from .text import fill, padded

LANES = 1024

PUT = """
@triton.jit(do_not_specialize=["low", "blocks"])
def $name(bytes_ptr, begin_ptr, end_ptr, pool8_ptr, table_ptr, table_width, low, blocks):
    block = tl.program_id(0)
    bh = tl.program_id(1)
    b = bh // $heads
    h = bh % $heads
    u = low + block * $tokens
    if (u >= tl.load(begin_ptr + b)) & (u < tl.load(end_ptr + b)):
        page = tl.load(table_ptr + b.to(tl.int64) * table_width + u // $page).to(tl.int64)
        out = pool8_ptr + page * $page_bytes + h * $head_bytes + $offset + u % $page // $tokens * $size
        source = bytes_ptr + (bh.to(tl.int64) * blocks + block) * $size
        $copies
"""


def put(plan: Plan, name: str, tokens: int, size: int, offset: int) -> str:
    """The text of a kernel that copies `size` bytes for every `tokens` tokens from `low` on, (B, H, blocks, size), to
    those of a section of the head's blob, of the blocks in [begin, end)."""
    layout, copies = plan.layout, []
    for start in range(0, size, LANES):
        count = min(LANES, size - start)
        lane = f"tl.arange(0, {padded(count)})"
        copies.append(f"lane = {lane} + {start}" if start else f"lane = {lane}")
        mask = f", mask=lane < {start + count}" if padded(count) > count else ""
        found = f"tl.load(source + lane{mask}{', other=0' * bool(mask)})"
        copies.append(f"tl.store(out + lane, {found}{mask})")
    return fill(
        PUT, name=name, heads=plan.shape.kv_heads, tokens=tokens, page=layout.page_tokens, size=size, offset=offset,
        page_bytes=layout.page_bytes, head_bytes=layout.head_bytes, copies=copies,
    )  # fmt: skip
