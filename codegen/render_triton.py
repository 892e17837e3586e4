"""A plan as one Triton module, in this order: imports, maps, pack, append, unpack, scores, decode, extend, merges,
reach, received."""

from __future__ import annotations

from .header import heading
from .plan import Plan
from .text import DEVICE, helpers_used
from .triton_append import append
from .triton_attend import Attend
from .triton_merge import collect, merge, unite
from .triton_queries import rounding
from .triton_received import Received
from .triton_rope import rope, unrope
from .triton_term_pages import pack_of, unpack_of
from .triton_turn import restore, turn, turn_query
from .unused import without_unused


def render(plan: Plan, name: str) -> str:
    """The whole text, formatted and deterministic."""
    attend = Attend(plan)
    kernels = [write(plan, term) for term in plan.spaces if term.mapped for write in (turn, restore)]
    if plan.maps_query:
        kernels += [turn_query(plan)] if plan.queries is None else rounding(plan, plan.queries)
    kernels += [unrope(plan), rope(plan)] if plan.keys.rope is not None else []
    kernels += [pack_of(plan, term) for term in plan.stored]
    kernels.append(append(plan))
    kernels += [unpack_of(plan, term, attend.addresses(several=False)) for term in plan.terms]
    kernels.append(attend.scores(plan.rows(many=True)))
    of_one = attend if plan.of_decode is plan else Attend(plan.of_decode)
    kernels.append(of_one.attention("decode", plan.columns(many=False)))
    kernels.append(attend.attention("extend", plan.columns(many=True)))
    kernels += [merge(plan), collect(plan), *([unite(plan)] if plan.values.through else [])]
    kernels += Received(plan).texts()
    body = "\n\n".join(without_unused(kernel) for kernel in kernels)
    imports = "import triton\nimport triton.language as tl\n" + helpers_used(DEVICE, body)
    return f"{heading(plan, name)}\n{imports}\n\n{body}"
