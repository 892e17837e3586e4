"""Triton's front end reads every kernel of every scheme for small heads, where planes are narrower than their lanes.

Types of branches that do not agree are told here, which the interpreter does not see; what other tests compile is of
heads of 128 channels, where more of them agree by chance.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from law_cases import PLAIN, RARE, fixed

from kvdsl.codegen import render
from kvdsl.codegen.launch import Launch
from kvdsl.codegen.launches import launches
from kvdsl.codegen.plan import plan_for
from kvdsl.rules import shape_faults
from kvdsl.scheme import Scheme
from kvdsl.shape import Shape
from kvdsl.testing import schemes, shapes

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


def refused(scheme: Scheme, shape: Shape, folder: Path) -> list[str]:
    """What is refused of all kernels."""
    plan = plan_for(scheme, shape)
    text, path = render(plan, "triton", "of_small_heads"), folder / "kernels.py"
    path.write_text(text)
    return read(path, launches(plan, text))


@pytest.mark.parametrize("name", [*PLAIN, *RARE])
def test_types_of_every_kernel_agree(name: str, tmp_path: Path) -> None:
    scheme = (PLAIN | RARE)[name].with_(layers=())
    shape = next(shape for shape in SHAPES if not shape_faults(scheme, shape))
    assert refused(scheme, shape, tmp_path) == []


def test_sketches_of_exact_keys_are_read_by_maps_in_half_precision(tmp_path: Path) -> None:
    """Codes meet float16, whatever the query is."""
    assert refused(RARE["chosen channels"], Shape(32, 1, 1, "fp32"), tmp_path) == []


@fixed(examples=8)
@given(st.data())
def test_types_of_kernels_of_any_legal_scheme_agree(tmp_path_factory: Any, data: Any) -> None:
    scheme = data.draw(schemes())
    assert refused(scheme, data.draw(shapes(scheme, widest=160)), tmp_path_factory.mktemp("any")) == []


def test_branches_of_unlike_types_are_told(tmp_path: Path) -> None:
    path = tmp_path / "kernels.py"
    path.write_text(UNLIKE)
    (failure,) = read(path, [Launch("branches", (("out_ptr", "*fp32"), ("first", "i32")))])
    assert failure.startswith("branches for sm_90: ") and "Mismatched type for x" in failure
