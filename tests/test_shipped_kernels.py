"""Every kernel of every shipped scheme: clean text that compiles for a GPU and keeps all of its numbers in registers.

The fast profile takes one shape and one architecture; KVDSL_PROFILE=thorough takes three of each.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvdsl.codegen import render
from kvdsl.codegen.aot import ARCHES, compile_many, line
from kvdsl.codegen.launches import launches
from kvdsl.codegen.lint import faults_in
from kvdsl.codegen.plan import plan_for
from kvdsl.rules import shape_faults
from kvdsl.schemes import ALL
from kvdsl.shape import Shape

pytest.importorskip("triton")

CACHE = Path(__file__).resolve().parent.parent / "build" / "aot"
THOROUGH = os.environ.get("KVDSL_PROFILE") == "thorough"
SHAPES = [Shape(128, 8, 32), Shape(64, 8, 8), Shape(128, 4, 64, dtype="bf16")] if THOROUGH else [Shape(128, 8, 32)]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape.head_dim}x{shape.group}-{shape.dtype}")
def test_every_kernel_of_every_shipped_scheme_compiles_without_spills(shape: Shape, tmp_path: Path) -> None:
    sources, names = [], []
    for name, scheme in ALL.items():
        if shape_faults(scheme, shape):
            continue
        plan = plan_for(scheme, shape)
        text = render(plan, "triton", name)
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        records = launches(plan, text)
        assert faults_in(text, records) == []
        sources.append((path, records))
        names.append(name)
    compiled = compile_many(sources, ARCHES if THOROUGH else ["sm_90"], cache_folder=CACHE)
    spilled = [
        f"{name}: {line(one)}" for name, found in zip(names, compiled, strict=True) for one in found if one.spilled
    ]
    assert not spilled, "\n" + "\n".join(spilled)
