"""What pack kernels may cost: instructions a number, loads and spills, read from machine code for sm_90.

Instructions are those of all lanes of a program on the way that every program with tokens takes, over the numbers that
it packs, at head_dim 128.  When a golden fails because a kernel became cheaper, `python benchmarks/static.py --golden
pack > tests/packing.json` renews it; where one became dearer the kernel is what is to be mended.
"""

from __future__ import annotations

import json
import runpy
from functools import cache
from pathlib import Path

import pytest

from kvdsl.codegen import aot, front_end, render
from kvdsl.codegen.assembling import read
from kvdsl.codegen.launches import launches
from kvdsl.codegen.plan import plan_for
from kvdsl.codegen.static import Figures, figures
from kvdsl.schemes import ALL
from kvdsl.shape import Shape

triton = pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "aot"
SHAPE = Shape(128, 8, 32)
CEILINGS = {
    "int8_token_head": (14.5, 14.5),
    "fp8_token_head": (20.0, 20.0),
    "token4": (15.5, 15.5),
    "int4_token_head": (16.0, 16.0),
    "kivi4": (18.5, 20.5),
    "kivi2": (21.5, 18.0),
}
"""Of keys and of values.  Where keys have a scale a channel, its arithmetic is repeated by all lanes that share it."""
GOLDEN = json.loads((ROOT / "tests" / "packing.json").read_text(encoding="utf-8"))
CHANGED = 0.03  # of the golden's instructions: less is the assembler's own doing
OTHER_TRITON = 1.1  # times the ceiling: what other versions, and their assemblers, differ by


@cache
def compiled(name: str) -> tuple[Figures, ...]:
    """Both pack kernels of a scheme on sm_90."""
    kernels = ("pack_keys", "pack_values")
    (found,) = figures({name: ALL[name]}, SHAPE, ("sm_90",), kernels=kernels, cache_folder=CACHE, workers=1).values()
    return tuple(found)


@pytest.mark.parametrize("name", list(CEILINGS))
def test_a_pack_kernel_costs_no_more_than_its_ceiling(name: str) -> None:
    """All faults of both kernels at once: a ceiling, spills, rows that are not read 16 bytes a lane, instructions that
    are not those of the golden."""
    faults = []
    for one, ceiling in zip(compiled(name), CEILINGS[name], strict=True):
        kernel, found, packing = one.kernel, one.instructions_per_element, one.packing
        same = kernel.triton == GOLDEN["triton"]
        assert found is not None and packing is not None
        if found > (limit := ceiling * (1 if same else OTHER_TRITON)):
            faults.append(f"{kernel.kernel}: {found:.2f} instructions a number, {limit:.2f} are allowed")
        if kernel.spilled:
            faults.append(f"{kernel.kernel}: {kernel.spills} spills, {kernel.stack} bytes of stack")
        side = plan_for(ALL[name], SHAPE).side(kernel.kernel.removeprefix("pack_"))
        wide = 16 * 32 * kernel.warps * one.wide_loads
        if side.layout.meta and side.layout.meta.tokens == 1 and wide < packing.bytes_read:
            faults.append(f"{kernel.kernel}: {wide} bytes are read 16 a lane, rows are {packing.bytes_read}")
        known = GOLDEN["instructions_per_element"].get(name, {}).get(kernel.kernel)
        if same and known and abs(found / known - 1) > CHANGED:
            faults.append(f"{kernel.kernel}: {found:.2f} instructions a number, {known} in tests/packing.json")
    assert not faults, "\n".join([name, *faults])


def test_the_golden_is_of_the_schemes_that_are_quick() -> None:
    assert tuple(GOLDEN["instructions_per_element"]) == runpy.run_path(str(ROOT / "benchmarks" / "static.py"))["PACKED"]
    assert set(GOLDEN["instructions_per_element"]) == set(CEILINGS)


def test_no_sum_of_ternary_codes_is_left_to_a_pair_of_16_bits(tmp_path: Path) -> None:
    """NVIDIA's assembler of CUDA 12.8 may make one half of such a pair anew and forget what was to be added: scales
    that are fitted to codes were wrong by a sixth on a GPU, at this shape and with four warps."""
    plan = plan_for(ALL["kvtq_2bit"], Shape(64, 2, 6))
    text = render(plan, "triton", "kvtq_2bit")
    path = tmp_path / "kernels.py"
    path.write_text(text, encoding="utf-8")
    (launch,) = (one for one in launches(plan, text) if one.kernel == "pack_keys")
    binary = aot._binary(front_end.load(path), launch, "sm_90", 1)
    assert launch.warps == 4
    assert not [one for one in read(binary.asm["cubin"]).code.instructions if "16x2" in one.opcode]
