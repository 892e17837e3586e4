"""Triton's front end reads every kernel of every scheme for small heads, where planes are narrower than their lanes.

Types of branches that do not agree are told here, which the interpreter does not see; what other tests compile is of
heads of 128 channels, where more of them agree by chance.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from law_cases import PLAIN, RARE

from kvdsl.codegen import render
from kvdsl.codegen.launch import Launch
from kvdsl.codegen.launches import launches
from kvdsl.codegen.plan import plan_for
from kvdsl.rules import shape_faults
from kvdsl.shape import Shape

pytest.importorskip("triton")

from kvdsl.codegen.front_end import read

SHAPES = (Shape(32, 1, 1), Shape(32, 2, 4), Shape(64, 2, 4), Shape(64, 4, 4), Shape(128, 1, 2), Shape(576, 1, 3))
UNLIKE = """
import triton
import triton.language as tl


@triton.jit
def branches(out_ptr, first):
    if first == 0:
        x = tl.zeros([16, 8], tl.float32)
        y = tl.max(x, 0)
    else:
        x = tl.zeros([32, 8], tl.float32)
        y = tl.max(x, 0)
    tl.store(out_ptr + tl.arange(0, 8), y)
"""


@pytest.mark.parametrize("name", [*PLAIN, *RARE])
def test_types_of_every_kernel_agree(name: str, tmp_path: Path) -> None:
    scheme = (PLAIN | RARE)[name].with_(layers=())
    plan = plan_for(scheme, next(shape for shape in SHAPES if not shape_faults(scheme, shape)))
    text, path = render(plan, "triton", "of_small_heads"), tmp_path / "kernels.py"
    path.write_text(text)
    assert read(path, launches(plan, text)) == []


def test_branches_of_unlike_types_are_told(tmp_path: Path) -> None:
    path = tmp_path / "kernels.py"
    path.write_text(UNLIKE)
    (failure,) = read(path, [Launch("branches", (("out_ptr", "*fp32"), ("first", "i32")))])
    assert failure.startswith("branches for sm_90: ") and "Mismatched type for x" in failure
