"""A plan as one torch module: pack, unpack and the two products of either side."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

from .header import heading
from .plan import Plan
from .text import imported
from .torch_sides import TorchSide


@cache
def helpers() -> tuple[str, ...]:
    """The names that host.py defines, read from its text."""
    tree = ast.parse((Path(__file__).parent / "host.py").read_text(encoding="utf-8"))
    return tuple(sorted({node.name for node in tree.body if isinstance(node, ast.FunctionDef)} | {"exact_quotient"}))


def render(plan: Plan, name: str) -> str:
    """The whole text, deterministic."""
    body = "\n\n".join(text for term in plan.terms for text in TorchSide(plan, term).functions())
    used = [helper for helper in helpers() if re.search(rf"(?<![\w.]){helper}\(", body)]
    imports = "import torch\n" + (imported("kvdsl.codegen.host", used) if used else "")
    return f"{heading(plan, name)}\n{imports}\n\n{body}"
