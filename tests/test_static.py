"""What is said of kernels beside their machine code: the fewest products, reasons in words, the page of figures."""

from __future__ import annotations

import re
import runpy
from dataclasses import replace
from pathlib import Path

import pytest

from kvdsl.codegen.aot import CompiledKernel
from kvdsl.codegen.compiling import told
from kvdsl.codegen.plan import plan_for
from kvdsl.codegen.static import Figures, Packing, ideal_mma, packing, reasons, untiered
from kvdsl.schemes import ALL
from kvdsl.segments import parts
from kvdsl.shape import Shape

ROOT = Path(__file__).resolve().parent.parent
SHAPE = Shape(128, 8, 32)
KERNEL = CompiledKernel(
    kernel="decode", arch="sm_90", gpu="H200", triton="3.7.1", warps=1, stages=3, registers=168, spills=0, stack=0,
    shared_bytes=19456, instructions=3872, straight_instructions=0, loop_spills=0, loop_instructions=680,
    guarded_instructions=0, loop_packed_bytes=8704, loop_copied_bytes=8832, loop_mma=64, hidden_mma=0,
    instructions_per_byte=0.078125, slots=10.0, mma=64 / 68, predicted_share=0.92, cubin_bytes=9000,
    shares={"H100": 0.93, "H200": 0.92},
    counts={"mma": 64, "bit": 272}, pipes={"alu": 4.0, "fp": 3.0, "mma": 1.0, "xu": 0.5, "mem": 1.0},
    loads={"LDGSTS.128": 16, "LDGSTS.64": 2, "LDG.32": 1, "LDSM.128": 20},
)  # fmt: skip


def ideal(name: str, shape: Shape = SHAPE, kernel: str = "decode") -> float:
    found = ideal_mma(plan_for(ALL[name], shape), kernel)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("name", "bits", "metadata"),
    [
        ("fp16", 16, 0),
        ("int8_tensor", 8, 0),
        ("token4", 4, 1 / 32),
        ("int4_token_head", 4, 1 / 32),
        ("token2", 2, 1 / 16),
        ("kivi2", 2, 1 / 4),
        ("token3", 3, 1 / 24),
    ],
)
def test_codes_of_b_bits_take_four_over_b_products_and_metadata_none(name: str, bits: int, metadata: float) -> None:
    """For 128 bytes of codes; what of 128 bytes is metadata takes a share of them away."""
    codes = bits / (bits + 2 * metadata * bits) if name == "kivi2" else bits / (bits + 2 * bits * metadata)
    assert ideal(name) == pytest.approx(4 / bits * codes)
    assert ideal(name, replace(SHAPE, q_heads=8)) == ideal(name)


def test_sixteen_rows_take_twice_the_products() -> None:
    many = Shape(128, 8, 128)
    assert plan_for(ALL["token4"], many).rows(many=False) == 16
    assert ideal("token4", many) == 2 * ideal("token4") == ideal("token4", kernel="extend")


def test_sides_of_different_widths_are_weighed_by_their_bytes() -> None:
    """kvtuner's own layers aside: 8-bit keys and 4-bit values of 128 channels, a scale and an offset a token."""
    plan = plan_for(ALL["vllm_k8v4"], SHAPE)
    bytes_ = 128 + 64 + 4
    assert ideal("vllm_k8v4") == pytest.approx((4 / 8 * 128 + 4 / 4 * 64) / bytes_)
    assert plan.keys.alphabet.bits == 8


def test_single_numbers_and_vectors_of_low_rank_are_bytes_without_products() -> None:
    assert ideal("kvquant4") < ideal("nuq4") and ideal("gear2") < ideal("kivi2")


def test_kernels_without_a_main_loop_and_float32_have_no_ideal() -> None:
    plan = plan_for(ALL["token4"], SHAPE)
    assert ideal_mma(plan, "pack_keys") is None and ideal_mma(plan, "merge") is None
    assert ideal_mma(plan_for(ALL["token4"], replace(SHAPE, dtype="fp32")), "decode") is None
    assert ideal_mma(plan_for(ALL["fp32"], SHAPE), "decode") is None


def test_products_are_told_over_the_ideal_where_all_are_counted() -> None:
    one = Figures(KERNEL, 64 / 68)
    assert one.mma_ratio == pytest.approx(1.0)
    assert (one.memory_loads, one.wide_loads) == (19, 16)
    assert sum(one.work.values()) == pytest.approx(1) and max(one.work, key=lambda pipe: one.work[pipe]) == "alu"
    assert Figures(replace(KERNEL, hidden_mma=8), 64 / 68).mma_ratio is None
    assert Figures(KERNEL, None).mma_ratio is None


def test_a_bulk_copy_is_wide() -> None:
    one = Figures(replace(KERNEL, loads={"UBLKCP": 2, "LDG.32": 1, "LDS.128": 4}), 1.0)
    assert (one.memory_loads, one.wide_loads) == (3, 2)


@pytest.mark.parametrize(
    ("name", "kernel", "tokens", "read", "written"),
    [
        ("int8_token_head", "pack_keys", 32, 256, 128 + 4),
        ("token4", "pack_values", 32, 256, 64 + 4),
        ("kivi2", "pack_keys", 32, 256, 32 + 128 * 4 / 32),
        ("kivi2", "pack_values", 32, 256, 32 + 4 * 4),
        ("fp16", "pack_keys", 32, 256, 256),
        ("quarot4", "pack_keys", 32, 512, 64 + 4),
        ("zipcache tiers[0]", "pack_values", 32, 256, 64 + 4 / 8),
    ],
)
def test_a_pack_kernel_moves_rows_and_packed_bytes(
    name: str, kernel: str, tokens: int, read: float, written: float
) -> None:
    """A token and kv head: float16 rows, or float32 ones behind a map, in; codes and what stands beside them out."""
    scheme = ALL[name] if name in ALL else parts(ALL["zipcache"])[name.removeprefix("zipcache ")]
    found = packing(plan_for(scheme, SHAPE), kernel)
    assert found is not None and (found.tokens, found.elements) == (tokens, 128 * tokens)
    assert (found.bytes_read, found.bytes_written) == (read * tokens, written * tokens)


def test_what_is_no_pack_kernel_of_codes_moves_nothing_that_is_told() -> None:
    assert packing(plan_for(ALL["kivi2"], SHAPE), "decode") is None
    assert packing(plan_for(ALL["gear2"], SHAPE), "pack_keys_residual") is None


def test_instructions_a_number_are_those_of_all_lanes_where_there_is_no_loop() -> None:
    pack = replace(KERNEL, kernel="pack_keys", predicted_share=None, loop_packed_bytes=0, warps=2)
    made = Packing(32, 4096, 8192, 4224)
    one = Figures(replace(pack, straight_instructions=1024), None, made)
    assert one.instructions_per_element == 2 * 1024 * 32 / 4096 == one.row()["instructions_per_element"]
    text = "\n".join(told([one.row()], details=True))
    assert "256 read and 132 written a token and kv head, 32 tokens a program" in text
    assert "16 of 19 loads of memory are of 16 bytes a lane" in text.replace("\n            ", " ")
    assert "1024 instructions of each of 2 warps" in text and "left out: 16.0 a number" in text
    loops = Figures(pack, None, made).row()
    assert loops["instructions_per_element"] is None and loops["elements"] == 4096
    assert "the kernel has loops" in "\n".join(told([loops], details=True))
    assert Figures(KERNEL, None).row()["bytes_read"] is None


def test_a_plain_scheme_needs_no_reason_and_every_other_has_those_of_its_plan() -> None:
    def words(name: str) -> str:
        return "\n".join(reasons(plan_for(ALL[name], SHAPE)))

    assert words("token4") == words("int8_tensor") == ""
    assert words("fp32") == "products are of float32 numbers, outside the tensor cores"
    assert words("token2") == "455 numbers are in 128 bytes: each is unpacked and multiplied, and tokens have softmax"
    assert "keys and values: codes of 3 bits stand in streams of 2 and 1" in words("token3")
    assert "keys: groups of 32 tokens have scales of their own a channel" in words("kivi2")
    assert "values: 4 groups of 32 channels of a token have their own scales and products" in words("kivi2")
    assert "every decoded pair of channels is turned" in words("nuq4") and "levels of the parameters" in words("nuq4")
    assert "table of 16 levels of the scheme" in words("turboquant4")
    assert "each code of e2m1" in words("nvfp4") and "scales are of two levels" in words("nvfp4")
    assert "vectors of rank" in words("gear2")
    assert "numbers, 2 a token, are brought to their places" in words("kvquant4")
    assert "keys and values: radii and angles become channels" in words("polar")
    assert "digits of three levels" in words("kvtq")
    assert "256 signs stand for 128 channels" in words("qjl_gauss") and "chosen channels" in words("kitty")


def test_what_tiers_store_stands_once_behind_its_place() -> None:
    found = untiered(ALL)
    assert {name for name, scheme in ALL.items() if not scheme.routed} <= set(found)
    assert any(name.startswith("zipcache_tiers_") for name in found) and len(set(found.values())) == len(found)


def test_a_kernel_is_told_in_a_row_and_a_block() -> None:
    other = replace(KERNEL, kernel="merge", predicted_share=None, loop_packed_bytes=0, shares={})
    rows = [Figures(KERNEL, 64 / 68).row(), Figures(other, None).row()]
    text = "\n".join(told(rows))
    assert "16 of 19" in text and "92% of H200" in text and "no kernel spills registers" in text
    assert "decode on sm_90, main loop, per 128 packed bytes: 10.0 instructions" in text
    assert "mma 0.94, bit 4.00" in text and "LDGSTS.128 x16, LDGSTS.64 x2, LDG.32 x1, LDSM.128 x20" in text
    assert "0.94 of 16x8x16, 1.00 times the 0.94 that the codes take" in text and "93% of H100, 92% of H200" in text
    assert "merge on sm_90" not in text
    many = Figures(replace(KERNEL, counts={f"class{i}": 68 for i in range(30)}), None).row()
    assert all(len(line) <= 118 for line in told([many])[4:]) and "\n            class" in "\n".join(told([many]))
    assert "merge on sm_90, the whole kernel" in "\n".join(told(rows, details=True))
    hidden = Figures(replace(KERNEL, hidden_mma=8), 64 / 68).row()
    assert "8 an iteration in tensor memory" in "\n".join(told([hidden]))
    assert "0.94 of 16x8x16\n" in "\n".join(told([Figures(KERNEL, None).row()]))


def test_the_page_has_a_row_a_scheme_and_a_section_a_slow_one() -> None:
    made = runpy.run_path(str(ROOT / "benchmarks" / "static.py"))
    shares = {"sm_80": {"A100 80 GB": 0.9}, "sm_90": {"H100": 0.93, "H200": 0.92}, "sm_100": {"B200": 0.7}}

    def rows(h100: float) -> dict[str, Figures]:
        own = {**shares, "sm_90": {"H100": h100, "H200": 0.5}}
        return {arch: Figures(replace(KERNEL, arch=arch, shares=own[arch]), 64 / 68) for arch in shares}

    chosen = made["schemes"](["token4", "kivi2"])
    text = made["page"](chosen, {"token4": rows(0.93), "kivi2": rows(0.62)})
    assert "Made by `python benchmarks/static.py > docs/static.md`" in text and "Triton 3.7.1; 2 of the " in text
    ((real, rest),) = re.findall(r"^\| `token4` .* 90% \| 93% \((\d+%)\) \| (.*) \|$", text, re.MULTILINE)
    assert re.sub(r" \(\d+%\)", "", rest) == "50% | 70%" and f"({real}, " in (ROOT / "docs" / "speed.md").read_text(
        encoding="utf-8"
    )
    assert "| `token4` | 4.25 | 10.0 | 1.00 | 168 | 0 | 16 of 19 |" in text
    assert "Of 2 schemes measured on the H100" in text
    table, _, sections = text.partition("## Under 85% of the H100")
    assert "`kivi2`" in table and "### `kivi2`" in sections and "token4" not in sections
    assert "62% at 10.0 slots: ALU 38%" in sections and "* keys: groups of 32 tokens" in sections
    assert '"token4": {\n   "sm_90": 10.0' in made["golden"]({"token4": {"sm_90": Figures(KERNEL, 1.0)}})
    with pytest.raises(SystemExit, match="no scheme without tiers is called zipcache"):
        made["schemes"](["zipcache"])


def test_the_page_in_the_docs_is_what_the_command_prints() -> None:
    """Its figures are of the kernels when it was made; its words and schemes are those of now."""
    made = runpy.run_path(str(ROOT / "benchmarks" / "static.py"))
    text = (ROOT / "docs" / "static.md").read_text(encoding="utf-8")
    table, _, sections = text.partition(f"## Under {made['ENOUGH']:.0%} of the {made['REFERENCE']}")
    assert table.startswith(made["HEAD"]) and "\n".join(made["cards"]()) in table
    share = r"(\d+)%(?: \(\d+%\))?"
    found = re.findall(rf"^\| `(\w+)` \|.* \| {share} \| {share} \| {share} \|$", table, re.MULTILINE)
    rows = {name: h100 for name, h100, _, _ in found}
    assert set(rows) == set(made["schemes"]([]))
    slow = re.findall(r"^### `(\w+)`\n\n(\d+)% at", sections, re.MULTILINE)
    assert all(rows[name] == told for name, told in slow)
    assert {name for name, told in rows.items() if int(told) < 100 * made["ENOUGH"]} <= dict(slow).keys()
