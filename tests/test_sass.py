"""Reading machine code: loops, the main loop among several, what an iteration runs, and the cost law."""

from __future__ import annotations

import pytest

from kvdsl.codegen import sass
from kvdsl.codegen.roofline import GPUS, predicted_share


def listing(*lines: str) -> str:
    """Text as nvdisasm writes it: labels end with a colon, everything else is an instruction."""
    out, address = ["\t.section\t.text.kernel", "kernel:"], 0
    for text in lines:
        if text.endswith(":"):
            out.append(text)
        else:
            out.append(f"        /*{address:04x}*/                   {text} ;")
            address += 16
    return "\n".join(out)


MAIN = [".L_x_1:", "LDGSTS.E.BYPASS.128 [R1], [R2.64]", "HMMA.16816.F32 R4, R8, R12, R4", "@!P1 BRA `(.L_x_1)"]
TAIL = [".L_x_2:", "LDG.E R8, [R2.64]", *["HMMA.16816.F32 R4, R8, R12, R4"] * 3, "@P2 BRA `(.L_x_2)"]
END = ["STG.E [R2.64], R4", "EXIT", ".L_x_9:", "BRA `(.L_x_9)"]


def test_labels_guards_and_operands_are_read() -> None:
    code = sass.parse(
        listing("@!P0 LDG.E.64 R2, desc[UR4][R6.64]", ".L_x_0:", "@UP1 UIADD3 UR4, UR4, 0x1, URZ", "EXIT")
    )
    assert [(one.guard, one.opcode) for one in code.instructions[:2]] == [("@!P0", "LDG.E.64"), ("@UP1", "UIADD3")]
    assert code.labels == {".L_x_0": 1}
    assert [one.kind for one in code.instructions] == ["global_load", "uniform", "control"]


def test_a_loop_is_a_way_back_and_the_endless_end_of_a_kernel_is_none() -> None:
    code = sass.parse(listing("MOV R1, R2", *MAIN, *END))
    assert [(loop.header, len(loop.body)) for loop in code.loops] == [(1, 3)]


def test_the_pipelined_loop_is_the_main_one_even_with_fewer_products() -> None:
    code = sass.parse(listing(*MAIN, *TAIL, *END))
    assert len(code.loops) == 2
    main = code.main_loop()
    assert main is not None and code.counts(main.path) == {"mma": 1, "async_copy": 1, "control": 1}


def test_without_copies_the_loop_with_most_products_is_the_main_one() -> None:
    few = [line.replace("LDGSTS.E.BYPASS.128", "LDG.E.128") for line in MAIN]
    code = sass.parse(listing(*few, *TAIL, *END))
    main = code.main_loop()
    assert main is not None and code.counts(main.path)["mma"] == 3


def test_a_loop_around_the_main_loop_is_not_the_main_one() -> None:
    outer = [".L_x_0:", "HMMA.16816.F32 R4, R8, R12, R4", *MAIN, "@P3 BRA `(.L_x_0)"]
    main = sass.parse(listing(*outer, *END)).main_loop()
    assert main is not None and len(main.body) == 3


def test_guarded_code_is_not_counted_in_an_iteration() -> None:
    rescale = ["BSSY B0, `(.L_x_5)", "@P0 BRA `(.L_x_4)", *["FMUL R1, R1, R2"] * 20, ".L_x_4:", "BSYNC B0", ".L_x_5:"]
    main = sass.parse(listing(*MAIN[:-1], *rescale, MAIN[-1], *END)).main_loop()
    assert main is not None
    assert (len(main.path), len(main.body)) == (6, 26)


def test_guarded_code_that_was_moved_behind_the_kernel_is_no_loop_of_its_own() -> None:
    lines = [*MAIN[:-1], "@P0 BRA `(.L_x_7)", ".L_x_6:", "FADD R1, R1, R2", MAIN[-1], *END[:2]]
    code = sass.parse(listing(*lines, ".L_x_7:", "FMUL R1, R1, R2", "BRA `(.L_x_6)"))
    (loop,) = code.loops
    assert (len(loop.path), len(loop.body)) == (5, 7)


def test_a_kernel_without_products_and_loads_in_a_loop_has_no_main_loop() -> None:
    assert sass.parse(listing("LDG.E R1, [R2.64]", *END)).main_loop() is None
    assert sass.parse("").main_loop() is None


def test_spills_are_every_access_of_local_memory() -> None:
    assert sass.parse(listing("STL.64 [R1], R2", "LDL R3, [R1+0x8]", *END)).spills == 2


@pytest.mark.parametrize(
    ("opcode", "units"),
    [
        ("HMMA.16816.F32", 1.0),
        ("HMMA.1688.F32", 0.5),
        ("HGMMA.64x8x16.F32", 4.0),
        ("IMMA.16832.S8.S8", 1.0),
        ("FFMA", 0.0),
    ],
)
def test_products_are_counted_in_units_of_one_shape(opcode: str, units: float) -> None:
    assert sass.Instruction(0, "", opcode, "").mma_units == units


def test_every_pipe_is_made_of_known_classes() -> None:
    assert {kind for kinds in sass.PIPES.values() for kind in kinds} <= set(sass.CLASSES)


def test_the_law_gives_the_measured_shares() -> None:
    """int4 and 2-bit decode on an H200: 91 % and 77 % of the read limit were measured."""
    int4 = {"alu": 5.1, "fp": 3.1, "mma": 0.94, "xu": 0.38, "mem": 0.97}
    int2 = {"alu": 10.3, "fp": 5.9, "mma": 1.78, "xu": 0.72, "mem": 1.25}
    assert predicted_share("sm_90", int4) == pytest.approx(0.91, abs=0.02)
    assert predicted_share("sm_90", int2) == pytest.approx(0.77, abs=0.08)
    assert predicted_share("sm_90", {}) == pytest.approx(0.93)
    assert GPUS["sm_90"].cycles_per_line == pytest.approx(30.4, abs=0.05)
