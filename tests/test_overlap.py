"""Kernels of a step that are launched before the one in front of them has ended: that they wait, and which they are."""

from __future__ import annotations

import re

import pytest

from kvdsl.codegen import render
from kvdsl.codegen.overlap import MERGES, overlapped
from kvdsl.codegen.plan import plan_for
from kvdsl.schemes import ALL
from kvdsl.shape import Shape

pytest.importorskip("triton")

SHAPE = Shape(128, 8, 32)
WRITTEN = {  # by the kernel in front -> what an early kernel reads of it
    **dict.fromkeys(MERGES, ("lse_ptr", "partial_ptr", "exact_ptr", "share_ptr")),
    **dict.fromkeys(("decode", "extend"), ("turned_ptr", "bias_ptr")),
}


def kernels(name: str) -> dict[str, str]:
    """Name -> body of the kernels of a scheme's text."""
    text = render(plan_for(ALL[name], SHAPE), "triton", name)
    found = re.findall(r"\ndef (\w+)\([^)]*\):\n((?:(?:    .*)?\n)+)", text)
    return dict(found)


@pytest.mark.parametrize("name", ["token4", "quarot4", "ultraquant4", "omniquant4"])
def test_an_early_kernel_waits_before_it_reads_and_the_one_in_front_lets_it_begin_before_it_stores(name: str) -> None:
    plan, found = plan_for(ALL[name], SHAPE), kernels(name)
    begun = {kernel for kernel in found if overlapped(kernel, plan)}
    assert begun == {kernel for kernel, text in found.items() if "await_last()" in text}
    assert begun == {*MERGES} & {*found} | ({"decode", "extend"} if plan.maps_query else set())
    for kernel in begun:
        before, _, behind = found[kernel].partition("await_last()")
        assert not any(pointer in before for pointer in WRITTEN[kernel])
        assert any(pointer in behind for pointer in WRITTEN[kernel])
    for kernel in ("decode", "extend"):
        before, *branches = found[kernel].split("let_next_begin()")
        assert "tl.store(" not in before and len(branches) == 2
        assert all("tl.store(" in branch for branch in branches)
    if plan.maps_query:  # at once where that is asked for, else where it is stored
        before, soon, behind = found["turn_query"].split("let_next_begin()")
        assert before.strip() == "if soon:" and "tl.store(" not in soon and "tl.store(" in behind
