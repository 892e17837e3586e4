"""Single numbers that are kept as they are, in Triton: put into pages, and vectors made of them again."""

from __future__ import annotations

from kvdsl.codes import SLOT_TOKENS

from .plan import Plan, SidePlan
from .text import fill, padded, plus
from .triton_slots import Slotted, held_by
from .triton_unpack import Unpack

PACK = """
@triton.jit(do_not_specialize=["low", "blocks"])
def pack_$side(
    numbers_ptr, places_ptr, begin_ptr, end_ptr, pool16_ptr, pool8_ptr, table_ptr, table_width, low, blocks
):
    block = tl.program_id(0)
    bh = tl.program_id(1)
    b = bh // $heads
    h = bh % $heads
    u = low + block * $tokens
    if (u >= tl.load(begin_ptr + b)) & (u < tl.load(end_ptr + b)):
        page = tl.load(table_ptr + b.to(tl.int64) * table_width + u // $page).to(tl.int64)
        lane = tl.arange(0, $lanes)
        source = (bh.to(tl.int64) * blocks + block) * $numbers + lane
        first = $first + lane
        numbers = pool16_ptr + page * $page_words + h * $head_words$numbers_offset + first
        places = pool8_ptr + page * $page_bytes + h * $head_bytes$places_offset + first
        $slots
"""


def pack(plan: Plan, side: SidePlan) -> str:
    """The text of `pack_<side>`: numbers, float16 bits, and places (B, H, blocks, slots, 64 or D) of tokens from `low`
    on, of the blocks of 64 tokens in [begin, end)."""
    layout, held, keys = plan.layout, held_by(side), side.name == "keys"
    width = SLOT_TOKENS if keys else held.width
    lanes = padded(width)
    mask = f", mask=lane < {width}" if lanes > width else ""
    slots = []
    for i in range(held.count):
        for name in ("numbers", "places"):
            found = f"tl.load({name}_ptr + source{plus(i * width)}{mask})"
            slots.append(f"tl.store({name}{plus(i * held.width)}, {found}{mask})")
    page = layout.page_tokens
    row = f"u % {page} // {SLOT_TOKENS} * {held.count * held.width}" if page > SLOT_TOKENS else "0"
    return fill(
        PACK, side=side.label, heads=plan.shape.kv_heads, tokens=SLOT_TOKENS, page=page, lanes=lanes,
        numbers=held.count * width, first=f"u % {page}" if keys else row, page_words=layout.page_bytes // 2,
        head_words=layout.head_bytes // 2, page_bytes=layout.page_bytes, head_bytes=layout.head_bytes,
        numbers_offset=plus(held.offset // 2), places_offset=plus(held.places_offset), slots=slots,
    )  # fmt: skip


class SlottedUnpack(Slotted, Unpack):
    """Vectors of what stands in slots, 0 elsewhere."""

    def decoded(self, half: int, tokens: str) -> list[str]:
        planes = range(self.side.layout.planes)
        keys, p = self.side.name == "keys", self.prefix
        lines = [f"n{j} = tl.zeros([{self.plan.half}, {self.lanes}], tl.float32)" for j in planes]
        for i in range(self.held.count):
            if keys:
                lines += self.of_tokens(i, tokens)
            for j in planes:
                if keys:
                    here, number = f"{p}_place[:, None] == {self.plane_lane(j)}[None, :]", f"{p}_number[:, None]"
                else:
                    lines += self.of_channels(i, j, self.block(half))
                    row = tokens if self.blocks == 1 else f"({tokens} % {SLOT_TOKENS})"
                    here, number = f"{p}_place[None, :] == {row}[:, None]", f"{p}_number[None, :]"
                lines.append(f"n{j} = n{j} + tl.where({here}, {number}, 0.0)")
        return lines
