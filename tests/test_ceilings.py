"""What decode kernels may cost: slots a scheme, products, loads and registers, read from machine code for sm_90.

Slots are instructions of all warps of a program for 128 packed bytes, at head_dim 128 and 4 query heads a kv head.  The
fast profile compiles the schemes of tests/slots.json, KVDSL_PROFILE=thorough every one that has a ceiling.  When a
golden fails because a kernel became cheaper, `python benchmarks/static.py --golden > tests/slots.json` renews it; where
one became dearer the kernel is what is to be mended.  Binaries are kept in build/aot between runs.
"""

from __future__ import annotations

import json
import os
import runpy
from functools import cache
from pathlib import Path

import pytest

from kvdsl.codegen.launches import loop_bytes
from kvdsl.codegen.plan import plan_for
from kvdsl.codegen.static import Figures, figures
from kvdsl.schemes import ALL
from kvdsl.shape import Shape

triton = pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "aot"
THOROUGH = os.environ.get("KVDSL_PROFILE") == "thorough"
SHAPE = Shape(128, 8, 32)
CEILINGS = {
    "int8_token_head": 7.4,
    "int8_tensor": 7.0,
    "fp8_tensor": 7.8,
    "token4": 10.9,
    "int4_token_head": 10.9,
    "quarot4": 10.9,
    "channel4": 12.9,
    "kivi4": 15.5,
    "token2": 18.0,
    "quarot2": 18.0,
    "bitdecoding2": 18.6,
    "token3": 20.0,
}
"""Slots on sm_90.  Up to 21 an H100 is predicted to read at 85 % of its limit."""
TEXT = {"int8_token_head": 3500, "token4": 3100, "token2": 3900, "token3": 5400, "kivi4": 4000}
"""Instructions of the whole kernel: of short contexts its text is a cost, which the instruction caches stop holding at
about 5,500 (88 KiB), see docs/design.md."""
GOLDEN = json.loads((ROOT / "tests" / "slots.json").read_text(encoding="utf-8"))
CHANGED = 0.03  # of the golden's slots: less is the assembler's own doing
OTHER_TRITON = 1.07  # times the ceiling: what 3.6, 3.7 and 3.9, and their assemblers, differ by
PRODUCTS = 0.02  # of the ideal
PAGE_NUMBER = {"LDG.32": 1}  # the one load of the loop that is no copy: the next page's number


@cache
def compiled(name: str) -> Figures:
    """The decode kernel of a scheme on sm_90."""
    ((found,),) = figures({name: ALL[name]}, SHAPE, ("sm_90",), cache_folder=CACHE, workers=1).values()
    return found


@pytest.mark.parametrize("name", list(CEILINGS) if THOROUGH else list(GOLDEN["slots"]))
def test_a_decode_kernel_costs_no_more_than_its_ceiling(name: str) -> None:
    """All faults of a kernel at once: ceilings, spills, repeated products, codes that are not copied 16 bytes a lane,
    slots that are not those of the golden."""
    one, plan = compiled(name), plan_for(ALL[name], SHAPE)
    kernel, faults = one.kernel, []
    same = kernel.triton == GOLDEN["triton"]
    if name in CEILINGS and kernel.slots > (limit := CEILINGS[name] * (1 if same else OTHER_TRITON)):
        faults.append(f"{kernel.slots:.2f} slots, {limit:.2f} are allowed")
    if kernel.instructions > (limit := TEXT.get(name, kernel.instructions) * (1 if same else OTHER_TRITON)):
        faults.append(f"{kernel.instructions} instructions, {limit:.0f} are allowed")
    if kernel.spilled:
        faults.append(f"{kernel.spills} spills, {kernel.stack} bytes of stack")
    # streams may be multiplied apart, each as if it were all of the codes
    streams = max(len(term.layout.streams) for term in plan.terms)
    ratio = one.mma_ratio
    if ratio is None or not 1 - PRODUCTS <= ratio <= streams * (1 + PRODUCTS):
        faults.append(f"{kernel.mma:.3f} products, the codes take {one.ideal_mma}, in {streams} streams")
    loads = {kind: count for kind, count in kernel.loads.items() if kind.split(".")[0] == "LDG"}
    if loads != PAGE_NUMBER:
        faults.append(f"loads that are no asynchronous copies: {loads}")
    codes = sum(stream.size for term in plan.terms for stream in term.layout.streams)
    codes = codes * plan.tile // plan.layout.page_tokens
    wide = 16 * 32 * kernel.warps * kernel.loads.get("LDGSTS.128", 0)
    if wide < codes:  # metadata may be narrower; where lanes of it are masked 16 bytes are more than there are
        faults.append(f"{wide} bytes are copied 16 a lane, codes are {codes} of {loop_bytes(plan)}")
    known = GOLDEN["slots"].get(name, {}).get("sm_90")
    if same and known and abs(kernel.slots / known - 1) > CHANGED:
        faults.append(f"{kernel.slots:.2f} slots, {known} in tests/slots.json")
    assert not faults, "\n".join([name, *faults, str(dict(kernel.counts)), str(dict(kernel.loads))])


def test_the_golden_is_of_the_schemes_that_are_quick() -> None:
    assert tuple(GOLDEN["slots"]) == runpy.run_path(str(ROOT / "benchmarks" / "static.py"))["QUICK"]
    assert set(GOLDEN["slots"]) <= set(CEILINGS)
