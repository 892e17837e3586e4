"""Single numbers that are kept as they are, in Triton: put into pages, and vectors made of them again."""

from __future__ import annotations

from kvdsl.codes import SLOT_TOKENS

from .plan import Plan, SidePlan
from .text import padded, plus
from .triton_put import of_blocks
from .triton_slots import Slotted, held_by
from .triton_unpack import Unpack


def pack(plan: Plan, side: SidePlan) -> str:
    """The text of `pack_<side>`: numbers, float16 bits, and places (B, H, blocks, slots, 64 or D) of tokens from `low`
    on, of the blocks of 64 tokens in [begin, end)."""
    layout, held, keys = plan.layout, held_by(side), side.name == "keys"
    width = SLOT_TOKENS if keys else held.width
    lanes = padded(width)
    mask = f", mask=lane < {width}" if lanes > width else ""
    page = layout.page_tokens
    row = f"u % {page} // {SLOT_TOKENS} * {held.count * held.width}" if page > SLOT_TOKENS else "0"
    numbers = f"page * {layout.page_bytes // 2} + h * {layout.head_bytes // 2}{plus(held.offset // 2)}"
    places = f"page * {layout.page_bytes} + h * {layout.head_bytes}{plus(held.places_offset)}"
    body = [
        f"lane = tl.arange(0, {lanes})",
        f"source = (bh.to(tl.int64) * blocks + block) * {held.count * width} + lane",
        f"first = {f'u % {page}' if keys else row} + lane",
        f"numbers = pool16_ptr + {numbers} + first",
        f"places = pool8_ptr + {places} + first",
    ]
    for i in range(held.count):
        for name in ("numbers", "places"):
            found = f"tl.load({name}_ptr + source{plus(i * width)}{mask})"
            body.append(f"tl.store({name}{plus(i * held.width)}, {found}{mask})")
    given, pools = "numbers_ptr, places_ptr", "pool16_ptr, pool8_ptr"
    return of_blocks(plan, f"pack_{side.label}", given, pools, SLOT_TOKENS, body)


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
