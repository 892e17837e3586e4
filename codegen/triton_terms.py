"""What reads each kind of term in Triton: codes, vectors of low rank, single numbers."""

from __future__ import annotations

from .plan import Plan, SidePlan
from .text import plus
from .triton_beside import BesideKeys
from .triton_factors import FactoredKeys, FactoredValues
from .triton_keys import Keys
from .triton_masked import MaskedKeys
from .triton_slots import SlottedKeys, SlottedValues
from .triton_values import Values


def keys_of(plan: Plan, side: SidePlan, head: int | None = None) -> Keys:
    """What reads a term of the keys."""
    if side.masked:
        return MaskedKeys(plan, side)
    if side.beside:
        return BesideKeys(plan, side, head)
    kind = FactoredKeys if side.factors else SlottedKeys if side.slots else Keys
    return kind(plan, side, head)


def values_of(plan: Plan, side: SidePlan, head: int | None = None) -> Values:
    """What reads a term of the values."""
    kind = FactoredValues if side.factors else SlottedValues if side.slots else Values
    return kind(plan, side, head)


def sections_of(plan: Plan, side: SidePlan) -> list[str]:
    """Lines that say where what is no code and no scale of head h begins in a page."""
    layout, parts = plan.layout, list[tuple[str, str, int, int]]()  # name, pool, bytes of an element, offset
    if held := side.factors:
        parts = [("rows", "pool_fp16_ptr", 2, held.offset), ("vectors", "pool_fp16_ptr", 2, held.vectors_offset)]
    if slots := side.slots:
        parts = [("numbers", "pool_fp16_ptr", 2, slots.offset), ("places", "pool8_ptr", 1, slots.places_offset)]
    if beside := side.beside:
        parts.append(
            ("numbers", "pool8_ptr" if beside.below else "pool_fp16_ptr", 1 if beside.below else 2, beside.offset)
        )
    if across := side.layout.across:
        parts.append(("across", "pool_fp16_ptr", 2, across.offset))
    if chosen := side.chosen:
        parts.append(("channels", "pool8_ptr", 1, chosen.offset))
    lines = list[str]()
    for name, pool, size, offset in parts:
        start = f"page * {layout.page_bytes // size} + h * {layout.head_bytes // size}{plus(offset // size)}"
        lines.append(f"{side.letter}_{name} = {pool} + {start}")
    return lines
