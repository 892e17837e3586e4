"""Kernels compiled for three architectures without a GPU: the figures that are read, and the faults that are told.

The compiling happens in child processes, so these tests run under TRITON_INTERPRET=1 too.  Binaries are kept in
build/aot between runs.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvdsl.codegen import aot, assembling
from kvdsl.codegen.aot import compile_in_child
from kvdsl.codegen.assembling import Assembly
from kvdsl.codegen.front_end import ARCHES, CompileError, compiler
from kvdsl.codegen.launch import Launch
from kvdsl.codegen.launches import ASSEMBLER
from kvdsl.codegen.lint import faults_in
from kvdsl.codegen.sass import Code
from kvdsl.errors import BackendError
from kvdsl.interpreting import INTERPRETER

pytest.importorskip("triton")
run_kernels = pytest.importorskip("kvdsl.codegen.run_kernels")

CACHE = Path(__file__).resolve().parent.parent / "build" / "aot"
TOKENS, WIDTH = 64, 32

# Scores of 4-bit keys and 8 query rows against one another; a small kernel with every part of a real one.
SMALL = '''"""Products of 4-bit codes."""

import triton
import triton.language as tl
from kvdsl.codegen.device import plane, upper


@triton.jit
def decode(query_ptr, words_ptr, out_ptr, tokens, STAGES: tl.constexpr):
    lane = tl.arange(0, 32)
    row = tl.arange(0, 8)
    head = tl.program_id(0).to(tl.int64)
    query = query_ptr + head * 1024 + row[None, :] * 128 + lane[:, None]
    q0 = tl.load(query).to(tl.float32).to(tl.float16)
    q1 = tl.load(query + 32).to(tl.float32).to(tl.float16)
    most = tl.full([8], -1.0e30, tl.float32)
    words = words_ptr + head * tokens * 32
    for start in tl.range(0, tokens, 64, num_stages=STAGES):
        t = start + tl.arange(0, 64)
        w = tl.load(words + t[:, None] * 32 + lane[None, :])
        s = tl.dot(plane(w, 15), q0)
        s = tl.dot(plane(upper(w), 15), q1, s)
        most = tl.maximum(most, tl.max(s, 0))
    tl.store(out_ptr + head * 8 + row, most)


@triton.jit
def refused(query_ptr, out_ptr):
    x = tl.load(query_ptr + tl.arange(0, 16)[:, None] * 8 + tl.arange(0, 8)[None, :]).to(tl.float16)
    tl.store(out_ptr + tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :], tl.dot(x, tl.trans(x)))


@triton.jit
def spilling(query_ptr, out_ptr):
    lane = tl.arange(0, 16384)
    x = tl.load(query_ptr + lane)
    tl.debug_barrier()
    y = tl.load(query_ptr + lane + tl.max(x.to(tl.float32), 0).to(tl.int32))
    tl.store(out_ptr + lane, x.to(tl.float32) + y.to(tl.float32) + tl.max(y.to(tl.float32), 0))
'''
DECODE = Launch(
    "decode",
    (
        ("query_ptr", "*fp16"),
        ("words_ptr", "*i16"),
        ("out_ptr", "*fp32"),
        ("tokens", "i32"),
        ("STAGES", "constexpr"),
    ),
    stages=(3, 2, 1),
    loop_packed_bytes=TOKENS * WIDTH * 2,
    aligned=("query_ptr", "words_ptr", "out_ptr", "tokens"),
)
PLAIN = (("query_ptr", "*fp16"), ("out_ptr", "*fp32"))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.py"
    path.write_text(SMALL)
    return path


def test_the_small_kernel_is_clean_text() -> None:
    assert faults_in(SMALL, [DECODE]) == []


def test_a_kernel_is_compiled_and_counted_on_every_architecture(small: Path) -> None:
    kernels = compile_in_child(small, [DECODE], ARCHES, cache_folder=CACHE)
    assert [kernel.arch for kernel in kernels] == list(ARCHES)
    for kernel in kernels:
        assert not kernel.spilled and kernel.loop_spills == 0
        assert 0 < kernel.registers < 200 and kernel.shared_bytes >= TOKENS * WIDTH * 2
        assert (
            kernel.loop_mma == kernel.counts["mma"] == 16
        )  # 4 blocks of 16 tokens, 2 planes of 2 steps of 16 channels
        assert kernel.mma == pytest.approx(16 * 128 / (TOKENS * WIDTH * 2))
        assert kernel.slots == pytest.approx(kernel.loop_instructions * 128 / (TOKENS * WIDTH * 2))
        assert kernel.instructions_per_byte == pytest.approx(kernel.slots / 128)
        assert sum(kernel.counts.values()) == kernel.loop_instructions < kernel.instructions
        assert kernel.predicted_share is not None and 0.3 < kernel.predicted_share < 0.93
        assert kernel.counts["async_copy"] >= 8 and kernel.cubin_bytes > 1000
        assert kernel.loads["LDGSTS.128"] == 8 and kernel.loop_copied_bytes == kernel.loop_packed_bytes
        assert kernel.pipes["mma"] == kernel.mma and kernel.hidden_mma == 0
        assert kernel.shares[kernel.gpu] == kernel.predicted_share


def test_the_mode_of_this_process_does_not_reach_the_child(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    (kernel,) = compile_in_child(small, [DECODE], cache_folder=CACHE)
    assert kernel.loop_mma == 16
    compiler.cache_clear()
    with pytest.raises(BackendError, match="compile_in_child"):
        aot.compile_text(small, [DECODE], "sm_90")


def test_what_triton_refuses_is_named_for_every_kernel(small: Path) -> None:
    """The interpreter accepts a product over 8 channels; the compiler must be seen to refuse it."""
    launches = [DECODE, Launch("refused", PLAIN), Launch("absent", PLAIN), Launch("decode", PLAIN)]
    with pytest.raises(CompileError) as error:
        compile_in_child(small, launches, cache_folder=CACHE)
    failures = error.value.failures
    assert [failure.split(" for ")[0] for failure in failures] == ["refused", "absent", "decode"]
    assert "no kernel of this name" in failures[1] and "launch has arguments" in failures[2]


def test_spills_are_seen(small: Path) -> None:
    (kernel,) = compile_in_child(small, [Launch("spilling", PLAIN, warps=1)], cache_folder=CACHE)
    assert kernel.spilled and kernel.spills > 0 and kernel.predicted_share is None


AGAIN = """
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from triton.compiler.compiler import CompiledKernel
from kvdsl.codegen import aot
from kvdsl.codegen.assembling import assembled_again, read, under
from kvdsl.codegen.front_end import load
from kvdsl.codegen.launch import Launch
from kvdsl.codegen.launches import ASSEMBLER

CompiledKernel._init_handles = lambda kernel: None  # there is no GPU
module, launch = load(Path(sys.argv[1])), Launch.from_json(eval(sys.argv[2]))
first = aot._binary(module, replace(launch, assembler=ASSEMBLER), "sm_90", 1)
gone = first.metadata._replace(extern_libs=(("libdevice", "/gone/libdevice.10.bc"),))
other = SimpleNamespace(asm=first.asm, src=first.src, metadata=gone)  # kept by a Triton that is there no more
assert under(first, None) is first
for setting in ASSEMBLER[1:]:
    whole = aot._binary(module, replace(launch, assembler=(setting,)), "sm_90", 1)
    for binary in (other, first):  # assembled, then found where it was kept
        alone, code = read(assembled_again(binary, setting)), read(whole.asm["cubin"])
        assert (alone.code, alone.registers, alone.stack) == (code.code, code.registers, code.stack), setting
        print(setting, alone.registers, alone.code.spills)
    kernel = under(first, setting)
    assert kernel.kernel == assembled_again(first, setting), setting
    assert kernel.metadata == first.metadata and kernel.asm["ptx"] == first.asm["ptx"]
    assert kernel.packed_metadata == whole.packed_metadata
"""


def test_a_kernel_that_is_assembled_again_is_what_triton_compiles_under_that_setting(
    small: Path, tmp_path: Path
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != INTERPRETER}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", AGAIN, str(small), repr(Launch("spilling", PLAIN, warps=1).to_json())]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(set(done.stdout.splitlines())) == len(ASSEMBLER) - 1


class Compiled:
    """What a launch gives."""

    def __init__(self, n_spills: int, n_regs: int = 0) -> None:
        self.n_spills, self.n_regs = n_spills, n_regs


@pytest.mark.parametrize("alone", [True, False])
def test_a_kernel_runs_under_the_setting_that_was_found(alone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has no spills is not assembled again; where the assembler does not run alone, that is told."""

    def found(binary: Compiled, settings: tuple[str | None, ...]) -> tuple[str | None, None]:
        assert binary.n_spills == 9 and settings == ASSEMBLER
        if not alone:
            raise BackendError("no assembler")
        return settings[2], None

    monkeypatch.setattr(run_kernels, "fewest_spills", found)
    monkeypatch.setattr(
        run_kernels, "under", lambda binary, setting: Compiled(5) if setting == ASSEMBLER[2] else binary
    )
    assert run_kernels._setting("decode", Compiled(0)) == (0, None)
    if alone:
        assert run_kernels._setting("decode", Compiled(9)) == (5, ASSEMBLER[2])
    else:
        with pytest.warns(UserWarning, match="decode runs with 9 numbers in memory: no assembler"):
            assert run_kernels._setting("decode", Compiled(9)) == (9, None)


@pytest.mark.parametrize("spills", [0, 10])
def test_room_for_more_registers_is_taken_unless_the_assembler_then_spills(
    spills: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it did for the decode kernel of `cq_4c8b` at head_dim 64, of 180 registers; ahead of time as where it runs."""
    monkeypatch.setattr(run_kernels, "under", lambda binary, setting: Compiled(spills))
    found = run_kernels._roomier("decode", Compiled(0, 180), 4, 2)
    assert found == (None if spills else "maxnreg=255")
    tight, roomy = (Assembly(b"", Code((), {}), count, stack) for count, stack in ((180, 0), (255, spills)))
    monkeypatch.setattr(assembling, "assembled_again", lambda binary, setting: setting)
    monkeypatch.setattr(assembling, "read", lambda cubin: roomy)
    binary = SimpleNamespace(metadata=SimpleNamespace(shared=50 << 10))
    assert assembling.roomier(binary, tight, 4, 228 << 10) is (tight if spills else roomy)


def test_the_pipeline_is_as_deep_as_shared_memory_lets_it(small: Path) -> None:
    """Its buffers are 4 KiB a stage here: 45 of them fit an H200 and no A100, 60 fit neither."""
    kernels = compile_in_child(small, [replace(DECODE, stages=(60, 45, 3))], ("sm_80", "sm_90"), cache_folder=CACHE)
    assert [kernel.stages for kernel in kernels] == [3, 45]
    with pytest.raises(CompileError, match="decode for sm_80: needs .* bytes of shared memory, A100"):
        compile_in_child(small, [replace(DECODE, stages=(60, 45))], ("sm_80",), cache_folder=CACHE)


CROWDED = """
import triton
import triton.language as tl


@triton.jit
def crowded(query_ptr, out_ptr):
    row = tl.arange(0, 64)[:, None] * 64
    a = tl.load(query_ptr + row + tl.arange(0, 64)[None, :])
    b = tl.load(query_ptr + tl.arange(0, 64)[:, None] * 256 + tl.arange(0, 256)[None, :])
    for i in range(4):
        total = tl.zeros((64, 256), tl.float32)
PRODUCTS        tl.store(out_ptr + i + tl.arange(0, 64)[:, None] * 256 + tl.arange(0, 256)[None, :], total)
"""


def test_a_kernel_that_wants_more_tensor_memory_than_there_is_is_named(tmp_path: Path) -> None:
    """Triton compiles it to a trap of a few instructions, which spills nothing."""
    many = "".join(f"        total += tl.dot(a + {i}.0, b, tl.zeros((64, 256), tl.float32))\n" for i in range(6))
    path = tmp_path / "crowded.py"
    path.write_text(CROWDED.replace("PRODUCTS", many))
    with pytest.raises(CompileError, match="crowded for sm_100: needs .* columns of tensor memory, B200 has 512"):
        compile_in_child(path, [Launch("crowded", PLAIN, warps=4)], ("sm_100",), cache_folder=CACHE)


def test_unknown_architectures_and_files_are_refused(small: Path, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="sm_75.*sm_80, sm_90, sm_100"):
        compile_in_child(small, [DECODE], ["sm_75"])
    with pytest.raises(BackendError, match="absent.py cannot be read"):
        compile_in_child(tmp_path / "absent.py", [DECODE], cache_folder=CACHE)


def test_a_cache_folder_that_cannot_be_written_is_named(small: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(BackendError, match="TRITON_CACHE_DIR"):
        compile_in_child(small, [DECODE], cache_folder=blocked / "inside")


def test_the_command_line_prints_a_line_or_json(small: Path, tmp_path: Path) -> None:
    (tmp_path / "launches.json").write_text(json.dumps([DECODE.to_json()]))
    environment = {name: value for name, value in os.environ.items() if name != INTERPRETER}
    environment |= {"TRITON_CACHE_DIR": str(CACHE)}
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-m", "kvdsl.codegen.aot", str(small), str(tmp_path / "launches.json")]
    for extra in ([], ["--json"]):
        done = subprocess.run([*command, *extra], cwd=root, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        if extra:
            assert json.loads(done.stdout)[0]["loop_mma"] == 16
        else:
            assert done.stdout.startswith("decode") and "of H200" in done.stdout


def test_a_launch_must_fit_itself() -> None:
    assert Launch.from_json(json.loads(json.dumps(DECODE.to_json()))) == DECODE
    for wrong in (
        {"signature": (("x", "i32"), ("x", "i32"))},
        {"signature": (("X", "constexpr"),)},
        {"signature": (("x", "i32"),), "constants": (("x", 1),)},
        {"signature": (("x", "i32"),), "aligned": ("y",)},
    ):
        with pytest.raises(ValueError, match="launch of kernel"):
            Launch("kernel", **wrong)


def test_failures_come_back_from_another_process() -> None:
    """A pool of processes pickles what a worker raises."""
    error = pickle.loads(pickle.dumps(CompileError(["decode: one", "merge: two"])))
    assert error.failures == ("decode: one", "merge: two") and str(error) == "decode: one\nmerge: two"
