"""What packs and unpacks each kind of term in Triton: codes, vectors of low rank, single numbers."""

from __future__ import annotations

from . import triton_beside_pages, triton_slot_pages
from .plan import Plan, SidePlan
from .triton_beside_pages import BesideUnpack
from .triton_factor_pages import FactoredPack, FactoredUnpack
from .triton_pack import Pack
from .triton_put import put
from .triton_slot_pages import SlottedUnpack
from .triton_unpack import Unpack


def pack_of(plan: Plan, side: SidePlan) -> str:
    """The text of what packs a term."""
    if side.slots:
        return triton_slot_pages.pack(plan, side)
    if side.beside:
        return triton_beside_pages.pack(plan, side)
    texts = [(FactoredPack if side.factors else Pack)(plan, side).text()]
    if across := side.layout.across:
        size = 2 * across.tokens if across.of_tokens else 2 * side.dim
        texts.append(put(plan, f"put_{side.space}_across", across.tokens, size, across.offset))
    if side.parted and not side.store.gathers:
        held = side.choice
        texts.append(put(plan, f"put_{side.space}_channels", held.tokens, held.count, held.offset))
    return "\n\n".join(texts)


def unpack_of(plan: Plan, side: SidePlan, addresses: list[str]) -> str:
    """The text of what unpacks a term."""
    kind = FactoredUnpack if side.factors else SlottedUnpack if side.slots else Unpack
    kind = BesideUnpack if side.beside else kind
    return kind(plan, side).text(addresses)
