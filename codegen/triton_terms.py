"""What reads each kind of term in Triton: codes, vectors of low rank, single numbers."""

from __future__ import annotations

from . import triton_factors, triton_slots
from .plan import Plan, SidePlan
from .triton_factors import FactoredKeys, FactoredValues
from .triton_keys import Keys
from .triton_slots import SlottedKeys, SlottedValues
from .triton_values import Values


def keys_of(plan: Plan, side: SidePlan, head: int | None = None) -> Keys:
    """What reads a term of the keys."""
    kind = FactoredKeys if side.factors else SlottedKeys if side.slots else Keys
    return kind(plan, side, head)


def values_of(plan: Plan, side: SidePlan, head: int | None = None) -> Values:
    """What reads a term of the values."""
    kind = FactoredValues if side.factors else SlottedValues if side.slots else Values
    return kind(plan, side, head)


def sections_of(plan: Plan, side: SidePlan) -> list[str]:
    """Lines that say where what is no code and no scale begins in a page."""
    if not side.factors and not side.slots:
        return []
    kind = triton_factors if side.factors else triton_slots
    return kind.sections(side, plan.layout.page_bytes, plan.layout.head_bytes)
