"""The merge that is launched early: when, on which GPUs, and that it waits before it touches anything."""

from __future__ import annotations

import re

import pytest

from kvdsl.codegen import overlap, render
from kvdsl.codegen.launch import CONSTEXPR, OVERLAP, Launch
from kvdsl.codegen.launches import launches
from kvdsl.codegen.plan import plan_for
from kvdsl.schemes import ALL
from kvdsl.shape import Shape

pytest.importorskip("triton")

PROCESSORS = 132
SHAPE = Shape(128, 8, 32)
FIRST = {"decode": "let_next_begin", "extend": "let_next_begin"}
FIRST |= dict.fromkeys(("merge", "collect", "unite"), "await_last")


@pytest.mark.parametrize(("programs", "right"), [(64, True), (128, False), (132, False), (264, True), (1584, True)])
def test_no_merge_comes_early_where_one_program_stands_on_each_processor(programs: int, right: bool) -> None:
    assert overlap.worthwhile(programs, PROCESSORS) is right


def test_older_gpus_do_not_overlap() -> None:
    assert not overlap.overlapping(8) and not overlap.here()


@pytest.mark.parametrize("name", ["token4", "quarot4"])
def test_a_kernel_waits_or_lets_go_before_anything_else(name: str) -> None:
    text = render(plan_for(ALL[name], SHAPE), "triton", name)
    heads = re.findall(
        r"def (\w+)\([^)]*\):\n(?:    ROWS: tl.constexpr = \d+\n)?    if PDL:\n        (\w+)\(\)\n", text
    )
    assert dict(heads) == {kernel: word for kernel, word in FIRST.items() if f"def {kernel}(" in text}


def test_a_launch_takes_it_from_the_gpu() -> None:
    plan = plan_for(ALL["token4"], SHAPE)
    found = {launch.kernel: launch for launch in launches(plan, render(plan, "triton", "token4"))}
    for kernel, launch in found.items():
        assert ((OVERLAP, CONSTEXPR) in launch.signature) is (kernel in FIRST)
    assert found["merge"].values(1, overlap=True)[OVERLAP] is True
    assert found["merge"].values(1)[OVERLAP] is False
    assert Launch.from_json(found["merge"].to_json()) == found["merge"]


def test_kernels_compile_with_it_and_without_it(tmp_path: object) -> None:
    from pathlib import Path

    from kvdsl.codegen.aot import compile_in_child

    plan = plan_for(ALL["token4"], SHAPE)
    text = render(plan, "triton", "token4")
    path = Path(str(tmp_path)) / "token4.py"
    path.write_text(text, encoding="utf-8")
    ends = [launch for launch in launches(plan, text) if launch.kernel == "merge"]
    old, new = compile_in_child(path, ends, ("sm_80", "sm_90"), workers=1)
    assert (old.arch, new.arch) == ("sm_80", "sm_90") and new.instructions > 0 and not (old.spilled or new.spilled)
