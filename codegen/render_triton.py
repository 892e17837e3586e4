"""A plan as one Triton module: imports, pack, unpack, scores, decode, extend, merge, in that order."""

from __future__ import annotations

import re

from .header import heading
from .plan import Plan
from .triton_attend import Attend
from .triton_pack import Pack, Unpack


def render(plan: Plan, name: str) -> str:
    """The whole text, formatted and deterministic."""
    attend = Attend(plan)
    kernels = [Pack(plan, side).text() for side in (plan.keys, plan.values)]
    kernels += [Unpack(plan, side).text(attend.addresses()) for side in (plan.keys, plan.values)]
    kernels.append(attend.scores(plan.rows(many=True)))
    kernels.append(attend.attention("decode", plan.rows(many=False)))
    kernels.append(attend.attention("extend", plan.rows(many=True)))
    kernels.append(attend.merge())
    body = "\n\n".join(kernels)
    used = sorted(name for name in _helpers() if re.search(rf"\b{name}\(", body))
    imports = f"import triton\nimport triton.language as tl\nfrom kvdsl.codegen.device import {', '.join(used)}\n"
    return f"{heading(plan, name)}\n{imports}\n\n{body}"


def _helpers() -> tuple[str, ...]:
    return (
        "above", "bits_bf16", "bits_fp16", "bits_fp32", "finite", "half", "half_bf16", "high_half", "high_half_bf16", "highest", "low_half",
        "low_half_bf16", "lowest", "nan", "nearest", "nearest_half_up", "plane", "quotient", "scale_over_zero_point", "tanh", "upper",
    )  # fmt: skip
