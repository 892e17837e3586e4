"""Bytes that are made in torch, put into pages: a row of them for every few tokens of a head."""

from __future__ import annotations

from .plan import Plan
from .text import fill, padded

LANES = 1024

PUT = """
@triton.jit(do_not_specialize=["table_width", "low", "blocks"])
def $name(
    $given, begin_ptr, end_ptr, $pools, table_ptr, table_width, low, blocks
):
    block = tl.program_id(0)
    bh = tl.program_id(1)
    b = bh // $heads
    h = bh % $heads
    u = low + block * $tokens
    if (u >= tl.load(begin_ptr + b)) & (u < tl.load(end_ptr + b)):
        page = tl.load(table_ptr + b.to(tl.int64) * table_width + u // $page).to(tl.int64)
        $body
"""


def of_blocks(plan: Plan, name: str, given: str, pools: str, tokens: int, body: list[str]) -> str:
    """The text of a kernel that puts what is given, (B, H, blocks, ...), into the pools: `body` does it for `tokens`
    tokens from u on, in `page`, of the blocks in [begin, end) from `low` on."""
    return fill(
        PUT, name=name, given=given, pools=pools, heads=plan.shape.kv_heads, tokens=tokens,
        page=plan.layout.page_tokens, body=body,
    )  # fmt: skip


def put(plan: Plan, name: str, tokens: int, size: int, offset: int) -> str:
    """The text of a kernel that copies `size` bytes for every `tokens` tokens to those of a section of the head's
    blob."""
    layout = plan.layout
    start = f"page * {layout.page_bytes} + h * {layout.head_bytes} + {offset}"
    body = [
        f"out = pool8_ptr + {start} + u % {layout.page_tokens} // {tokens} * {size}",
        f"source = bytes_ptr + (bh.to(tl.int64) * blocks + block) * {size}",
    ]
    for first in range(0, size, LANES):
        count = min(LANES, size - first)
        lane = f"tl.arange(0, {padded(count)})"
        body.append(f"lane = {lane} + {first}" if first else f"lane = {lane}")
        mask = f", mask=lane < {first + count}" if padded(count) > count else ""
        found = f"tl.load(source + lane{mask}{', other=0' * bool(mask)})"
        body.append(f"tl.store(out + lane, {found}{mask})")
    return of_blocks(plan, name, "bytes_ptr", "pool8_ptr", tokens, body)
