"""A plan as one torch module: pack, unpack and the two products of either side."""

from __future__ import annotations

from .header import heading
from .plan import Plan
from .text import helpers_used
from .torch_queries import rounding
from .torch_sides import TorchSide

HOST = (
    "host", "host_additive", "host_beside", "host_blocks", "host_factors", "host_maps", "host_products", "host_slots",
    "host_vectors",
)  # fmt: skip


def render(plan: Plan, name: str) -> str:
    """The whole text, deterministic."""
    texts = [text for term in plan.terms for text in TorchSide(plan, term).functions()]
    texts += rounding(plan.queries) if plan.queries is not None else []
    body = "\n\n".join(texts)
    imports = "import torch\n" + helpers_used(HOST, body)
    return f"{heading(plan, name)}\n{imports}\n\n{body}"
