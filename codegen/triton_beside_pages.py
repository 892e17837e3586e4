"""Numbers of channels that are chosen anew, in Triton: put into pages, and read back."""

from __future__ import annotations

from .plan import Plan, SidePlan
from .triton_beside import Gathered, held_by
from .triton_put import put
from .triton_unpack import Unpack

PUT_TOKENS = 32  # of what is put at a time: a choice is of a multiple


def pack(plan: Plan, side: SidePlan) -> str:
    """The text of what puts the bytes of 32 tokens into their rows."""
    held = held_by(side)
    return put(plan, f"put_{side.space}", PUT_TOKENS, held.size(PUT_TOKENS), held.offset)


class BesideUnpack(Gathered, Unpack):
    """What is kept of the chosen channels, number by number."""

    def foreign(self) -> tuple[str, ...]:
        scales = f"{self.whole.letter}_meta" if self.held.below else ""  # those of all channels
        return tuple(name for name in super().foreign() if name != scales)

    def decoded(self, half: int, tokens: str) -> list[str]:
        p = self.prefix
        lines = [*self.numbers(tokens), f"n0 = {p}_number.to(tl.float32)"]
        if not self.held.below:
            return lines
        loads, axes = self.scales(tokens, self.first(half), self.plan.half)
        scale = f"{self.scale}[None, :]" if axes == "channels" else self.scale
        return [*self.channel(self.first(half)), *lines, *loads, f"n0 = n0 * {scale}"]
