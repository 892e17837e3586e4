"""A plan as one Triton module: imports, maps, pack, unpack, scores, decode, extend, merge, in that order."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

from .header import heading
from .plan import Plan
from .text import imported, without_unused
from .triton_attend import Attend
from .triton_merge import merge
from .triton_pack import Pack
from .triton_rope import rope, unrope
from .triton_turn import restore, turn, turn_query
from .triton_unpack import Unpack


@cache
def helpers() -> tuple[str, ...]:
    """The names that device.py defines, read from its text: it must not be imported to print."""
    tree = ast.parse((Path(__file__).parent / "device.py").read_text(encoding="utf-8"))
    return tuple(sorted({node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}))


def render(plan: Plan, name: str) -> str:
    """The whole text, formatted and deterministic."""
    attend = Attend(plan)
    sides = (plan.keys, plan.values)
    kernels = [write(plan, side) for side in sides if side.mapped for write in (turn, restore)]
    kernels += [turn_query(plan)] if plan.keys.mapped else []
    kernels += [unrope(plan), rope(plan)] if plan.keys.rope is not None else []
    kernels += [Pack(plan, side).text() for side in sides]
    kernels += [Unpack(plan, side).text(attend.addresses()) for side in sides]
    kernels.append(attend.scores(plan.rows(many=True)))
    kernels.append(attend.attention("decode", plan.rows(many=False)))
    kernels.append(attend.attention("extend", plan.rows(many=True)))
    kernels.append(merge(plan))
    body = "\n\n".join(without_unused(kernel) for kernel in kernels)
    used = sorted(name for name in helpers() if re.search(rf"\b{name}\(", body))
    imports = "import triton\nimport triton.language as tl\n" + imported("kvdsl.codegen.device", used)
    return f"{heading(plan, name)}\n{imports}\n\n{body}"
