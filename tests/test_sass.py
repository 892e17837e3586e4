"""Reading machine code: loops, the main loop among several, what an iteration runs, and the cost law."""

from __future__ import annotations

import pytest

from kvdsl.codegen import sass
from kvdsl.codegen.roofline import CARDS, GPUS, cycles, predicted_share, shares


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


@pytest.mark.parametrize(
    "loop",
    [
        MAIN,
        [line.replace("HMMA.16816.F32", "FFMA") for line in MAIN],  # products of float32 numbers are no matrix products
        [line.replace("LDGSTS.E.BYPASS.128", "LDG.E.128") for line in MAIN],
    ],
    ids=["copied and multiplied", "copied", "multiplied"],
)
def test_the_first_loop_is_the_main_one_whatever_those_behind_have(loop: list[str]) -> None:
    """Loops over edges have copies and, beside float32 pages, more products."""
    plain = [".L_x_3:", "LDG.E R8, [R2.64]", "@P2 BRA `(.L_x_3)"]
    code = sass.parse(listing(*plain, *loop, *TAIL, *MAIN[1:-1], *END))
    assert len(code.loops) == 3
    main = code.main_loop()
    assert main is not None and main.header == 2


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


def test_the_straight_way_does_the_work_and_no_slow_path() -> None:
    """Past an early end, through the stores, and round what is longer and moves nothing."""
    slow = ["@P1 BRA `(.L_x_1)", "MUFU.RCP R4, R5", "BRA `(.L_x_2)", ".L_x_1:", *["FFMA R4, R4, R5, R6"] * 9, ".L_x_2:"]
    early = ["@P0 BRA `(.L_x_8)", "LDG.E R5, [R2.64]"]
    rare = ["STG.E [R2.64], R4", "EXIT", ".L_x_8:", "EXIT", ".L_x_9:", "BRA `(.L_x_9)"]
    code = sass.parse(listing(*early, *slow, *rare))
    assert [code.instructions[at].head for at in code.straight] == ["BRA", "LDG", "BRA", "MUFU", "BRA", "STG", "EXIT"]
    assert sass.parse(listing(*MAIN, *END)).straight == ()


def test_spills_are_every_access_of_local_memory() -> None:
    assert sass.parse(listing("STL.64 [R1], R2", "LDL R3, [R1+0x8]", *END)).spills == 2


@pytest.mark.parametrize(
    ("opcode", "units"),
    [
        ("HMMA.16816.F32", 1.0),
        ("HMMA.1688.F32", 0.5),
        ("HGMMA.64x8x16.F32", 1.0),
        ("HGMMA.64x32x16.F32", 4.0),
        ("IMMA.16832.S8.S8", 1.0),
        ("UTCHMMA", 0.0),
        ("FFMA", 0.0),
    ],
)
def test_products_are_counted_in_units_of_one_shape(opcode: str, units: float) -> None:
    assert sass.Instruction(0, "", opcode, "").mma_units == units


# As disassemblers of several versions of Triton, 3.6 to 3.9, and of CUDA before them write loads.
SAMPLES = {
    "LDGSTS.E.BYPASS.128 [R247+0x12800], desc[UR26][R126.64+-0x70], !P2": ("LDGSTS.128", 16),
    "LDGSTS.E.BYPASS.LTC128B.128 [R1], [R2.64]": ("LDGSTS.128", 16),
    "@!P4 LDGSTS.E.64 [R202+0x13680], desc[UR12][R78.64+-0x180], !P1": ("LDGSTS.64", 8),
    "LDGSTS.E [R180+0x14c40], desc[UR26][R128.64], !P2": ("LDGSTS.32", 4),
    "LDG.E.U8 R104, desc[UR26][R104.64+0x2280]": ("LDG.8", 1),
    "LDG.E.U16.CONSTANT R28, [R164.64+0x10c0]": ("LDG.16", 2),
    "@!P1 LDG.E R76, desc[UR12][R12.64]": ("LDG.32", 4),
    "LDG.E.128.CONSTANT R4, desc[UR4][R2.64]": ("LDG.128", 16),
    "LDG.E.ENL2.256 R4, R8, desc[UR4][R2.64]": ("LDG.256", 32),
    "UTMALDG.2D [UR8], [UR4]": ("UTMALDG", 0),
    "UBLKCP.S.G [UR4], [UR6], UR8": ("UBLKCP", 0),
    "LDSM.16.M88.4 R8, [R3]": ("LDSM.128", 0),
    "LDSM.16.MT88.2 R8, [R3]": ("LDSM.64", 0),
    "LDSM.16.M88 R8, [R3]": ("LDSM.32", 0),
    "LDS.U16 R8, [R3]": ("LDS.16", 0),
    "LDS.64 R8, [R3]": ("LDS.64", 0),
    "LDTM.16dp32bit_t0_t15.x16 R4, tmem[UR11+0x48]": ("LDTM", 0),
}


@pytest.mark.parametrize("text", SAMPLES)
def test_loads_have_a_kind_and_a_width(text: str) -> None:
    code = sass.parse(listing(text))
    name, size = SAMPLES[text]
    assert code.loads([0]) == {name: 1} and code.copied([0]) == 32 * size


def test_loads_are_told_from_memory_to_shared_memory_and_from_wide_to_narrow() -> None:
    texts = ["LDS R1, [R2]", "LDG.E R1, [R2.64]", "STG.E [R2.64], R4", "LDGSTS.E [R1], [R2.64]"]
    code = sass.parse(listing(*texts, *["LDGSTS.E.BYPASS.128 [R1], [R2.64]"] * 2))
    assert list(code.loads(range(6)).items()) == [("LDGSTS.128", 2), ("LDGSTS.32", 1), ("LDG.32", 1), ("LDS.32", 1)]


def test_products_whose_shape_has_small_letters_are_read_from_a_listing() -> None:
    code = sass.parse(listing("HGMMA.64x32x16.F32 R72, R28, gdesc[UR16].tnspB, RZ, !UPT, gsb0"))
    assert code.pipes([0])["mma"] == 4.0


def test_products_of_tensor_memory_are_hidden() -> None:
    """One thread starts them, behind a branch: no warp's path has them, and no opcode their size."""
    lines = ["@!P1 BRA `(.L_x_2)", "UTCHMMA tmem[UR22], gdesc[UR4], tmem[UR21], tmem[UR26], idesc[UR27], !UPT"]
    code = sass.parse(listing(*MAIN[:-1], *lines, ".L_x_2:", MAIN[-1], *END))
    (loop,) = code.loops
    assert code.pipes(loop.path)["mma"] == 1.0
    assert [code.instructions[at].opcode for at in loop.body if code.instructions[at].hidden] == ["UTCHMMA"]


@pytest.mark.parametrize(
    ("opcode", "kind"),
    [
        ("CREDUX.MAX.F32", "shuffle"),
        ("ELECT", "shuffle"),
        ("ENDCOLLECTIVE", "sync"),
        ("VIADDMNMX", "integer"),
        ("FFMA2", "fp32"),
        ("F2FP.F16.E4M3.UNPACK_B", "convert"),
        ("UIADD3", "uniform"),
        ("NEWER", "other"),
    ],
)
def test_opcodes_of_newer_versions_have_a_class(opcode: str, kind: str) -> None:
    assert sass.parse(listing(f"{opcode} R1, R2")).instructions[0].kind == kind


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


def test_a_kernel_has_a_share_of_every_gpu_that_runs_its_code() -> None:
    pipes = {"alu": 5.1, "fp": 3.1, "mma": 0.94, "xu": 0.38, "mem": 0.97}
    assert list(shares("sm_90", pipes)) == ["H100", "H200"] and list(shares("sm_80", pipes)) == ["A100 80 GB"]
    assert shares("sm_90", pipes)["H200"] == predicted_share("sm_90", pipes) < shares("sm_90", pipes)["H100"]
    assert shares("sm_100", pipes) == {"B200": predicted_share("sm_100", pipes)}
    assert {gpu.name: round(gpu.cycles_per_line, 1) for gpu in CARDS}["H100"] == 43.0
    assert sum(cycles(pipes).values()) == pytest.approx(2 * 5.1 + 3.1 + 4 * 0.94 + 2 * 0.38 + 5 * 0.97)
