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

HOST = ("host", "host_factors")


@cache
def helpers(module: str) -> tuple[str, ...]:
    """The names that a module of HOST defines, read from its text."""
    tree = ast.parse((Path(__file__).parent / f"{module}.py").read_text(encoding="utf-8"))
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    return tuple(sorted(names | ({"exact_quotient"} if module == "host" else set())))


def render(plan: Plan, name: str) -> str:
    """The whole text, deterministic."""
    body = "\n\n".join(text for term in plan.terms for text in TorchSide(plan, term).functions())
    imports = "import torch\n"
    for module in HOST:
        used = [helper for helper in helpers(module) if re.search(rf"(?<![\w.]){helper}\(", body)]
        imports += imported(f"kvdsl.codegen.{module}", used) if used else ""
    return f"{heading(plan, name)}\n{imports}\n\n{body}"
