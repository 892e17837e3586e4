"""Compile generated kernels ahead of time, with no GPU, and read from the machine code what they will cost.

Triton's interpreter and its compiler cannot share a process: the mode is fixed when `triton` is imported.  Hence
`compile_in_child`, which works anywhere; `compile_text` is for a process in which TRITON_INTERPRET is not set.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

from kvdsl import errors
from kvdsl.errors import BackendError
from kvdsl.interpreting import INTERPRETER

from .assembling import Assembly, fewest_spills, roomier
from .front_end import ARCHES, CompileError, aimed_at, check, compiler, load, source_of, told
from .launch import ATTEND, Launch, assembled
from .operands import misread
from .roofline import GPUS, LINE, predicted_share, shares

TENSOR_MEMORY = 512  # columns, of the GPUs that have any
_ANSWER = "kvdsl-aot:"  # before the answer of the child: libraries may print too


@dataclass(frozen=True)
class CompiledKernel:
    """What one kernel is on one architecture.

    stages               depth of the pipeline, the first of the launch whose buffers fit and that spills nothing
    registers            per thread
    spills, stack        instructions on local memory; bytes of stack per thread: both 0 in a good kernel
    shared_bytes         shared memory of a program
    straight_instructions   of one warp on the way that loads and stores most, of a kernel without loops: no slow paths,
                         no early ends; 0 of a kernel that has a loop
    loop_spills          of the spills, those that every iteration of the main loop runs
    loop_instructions    of one warp in one iteration of the main loop, guarded code left out; 0 without a main loop
    guarded_instructions of the main loop that an iteration may skip
    loop_packed_bytes    packed bytes that a program reads in an iteration, as the launch says
    loop_copied_bytes    bytes of memory that the copies and loads of that iteration ask for, had no lane been masked;
                         far more than the packed bytes where heads are read together or words are read again
    loop_mma             instructions on matrix units in that iteration
    hidden_mma           of the loop, products of tensor memory (sm_100): their size is in a register, `mma` is without
                         them
    instructions_per_byte, slots   instructions of all warps per packed byte, per 128 packed bytes
    mma                  m16n8k16 products of all warps per 128 packed bytes
    predicted_share      of the read limit of `gpu`; None where no packed bytes are read in a loop
    shares               the same of every GPU that runs this code, by its name; empty where that is None
    counts               class -> instructions in the loop (of the whole kernel where no packed bytes are read in one)
    pipes                pipe of the law -> instructions of all warps per 128 packed bytes, "mma" in m16n8k16 products
    loads                kind and bits a lane, "LDGSTS.128" -> copies and loads, as `counts`
    """

    kernel: str
    arch: str
    gpu: str
    triton: str
    warps: int
    stages: int
    registers: int
    spills: int
    stack: int
    shared_bytes: int
    instructions: int
    straight_instructions: int
    loop_spills: int
    loop_instructions: int
    guarded_instructions: int
    loop_packed_bytes: int
    loop_copied_bytes: int
    loop_mma: int
    hidden_mma: int
    instructions_per_byte: float
    slots: float
    mma: float
    predicted_share: float | None
    cubin_bytes: int
    shares: Mapping[str, float] = field(hash=False)
    counts: Mapping[str, int] = field(hash=False)
    pipes: Mapping[str, float] = field(hash=False)
    loads: Mapping[str, int] = field(hash=False)

    @property
    def spilled(self) -> bool:
        return self.spills > 0 or self.stack > 0


def compile_text(source: Path | ModuleType, launches: Sequence[Launch], arch: str) -> list[CompiledKernel]:
    """Compile kernels of a generated file, or of a module loaded from one, for "sm_80", "sm_90" or "sm_100".

    Raises BackendError where this process, this machine or the architecture cannot compile, CompileError where Triton
    refuses a kernel.
    """
    check(arch)
    compiler()
    module = source if isinstance(source, ModuleType) else load(source)
    return [_best(module, launch, arch) for launch in launches]


def compile_in_child(
    source: Path | str,
    launches: Sequence[Launch],
    arches: Sequence[str] = ("sm_90",),
    *,
    workers: int = 2,
    cache_folder: Path | None = None,
) -> list[CompiledKernel]:
    """Compile in a process of its own, whatever the mode of this one: for each architecture every launch, in order."""
    return compile_many([(Path(source), launches)], arches, workers=workers, cache_folder=cache_folder)[0]


def compile_many(
    sources: Sequence[tuple[Path, Sequence[Launch]]],
    arches: Sequence[str] = ("sm_90",),
    *,
    workers: int = 2,
    cache_folder: Path | None = None,
) -> list[list[CompiledKernel]]:
    """Compile several generated files in one child process: for each file what `compile_in_child` gives.

    `cache_folder` is for Triton's binaries; it is made private, because Triton loads what it finds there unchecked.
    Raises CompileError naming every kernel that failed.
    """
    for arch in arches:
        check(arch)
    tasks = [
        {"path": str(Path(path).resolve()), "launch": launch.to_json(), "arch": arch}
        for path, launches in sources
        for arch in arches
        for launch in launches
    ]
    answers = _ask_child({"tasks": tasks, "workers": workers}, cache_folder)
    if failures := [answer["failure"] for answer in answers if "failure" in answer]:
        raise CompileError(failures)
    kernels = iter(CompiledKernel(**answer) for answer in answers)
    return [[next(kernels) for _ in arches for _ in launches] for _, launches in sources]


def _ask_child(request: Mapping[str, Any], cache_folder: Path | None) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != INTERPRETER}
    package = Path(errors.__file__).absolute().parent.parent  # the folder that `import kvdsl` found it in
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH")]))
    if cache_folder is not None:
        try:
            cache_folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise BackendError(f"{cache_folder} cannot be made ({error.strerror}) to be TRITON_CACHE_DIR") from error
        environment["TRITON_CACHE_DIR"] = str(cache_folder.resolve())
    command = [sys.executable, "-m", "kvdsl.codegen.aot", "--json"]
    child = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, env=environment)
    for line in child.stdout.splitlines():
        if line.startswith(_ANSWER):
            answers: list[dict[str, Any]] = json.loads(line.removeprefix(_ANSWER))
            return answers
    why = (child.stderr.strip().splitlines() or ["no message"])[-1]
    raise BackendError(f"the compiling process ended with status {child.returncode}: {why}")


def _best(module: ModuleType, launch: Launch, arch: str) -> CompiledKernel:
    """At the first depth whose buffers fit and under the first setting of the assembler where no number is moved to
    memory, else where the fewest are.  Raises CompileError where no depth fits."""
    limit, best = GPUS[arch].shared, None
    for stages in launch.stages:
        binary = _binary(module, launch, arch, stages)
        columns = getattr(binary.metadata, "tmem_size", None) or 0
        if binary.metadata.shared > limit or columns > TENSOR_MEMORY:
            continue
        setting, assembly = fewest_spills(binary, launch.assembler)
        if launch.kernel in ATTEND and setting is None:
            assembly = roomier(binary, assembly, launch.warps, limit)
        found = _measured(launch, arch, stages, binary.metadata.shared, assembly)
        if best is None or (found.spilled, found.spills) < (best.spilled, best.spills):
            best = found
        if not best.spilled:
            break
    if best is not None:
        return best
    needed = f"needs {binary.metadata.shared} bytes of shared memory, {GPUS[arch].name} has {limit}"
    if columns > TENSOR_MEMORY:  # Triton makes a kernel that only stops, and refuses to launch it
        needed = f"needs {columns} columns of tensor memory, {GPUS[arch].name} has {TENSOR_MEMORY}"
    raise CompileError([f"{launch.kernel} for {arch}: {needed}"])


def _binary(module: ModuleType, launch: Launch, arch: str, stages: int) -> Any:
    """Triton's compiled kernel (`.asm`, `.metadata`), under the first setting of the assembler."""
    options: dict[str, object] = {"num_warps": launch.warps, "num_stages": stages}
    options |= {"enable_fp_fusion": launch.fp_fusion, **assembled(launch.assembler[0])}
    with told(launch, arch), aimed_at(arch) as target:
        binary = compiler().compile(source_of(module, launch, arch, stages), target=target, options=options)
    if fault := misread(binary.asm["ttgir"]):
        raise CompileError([f"{launch.kernel} for {arch}: {fault}"])
    return binary


def _measured(launch: Launch, arch: str, stages: int, shared: int, assembly: Assembly) -> CompiledKernel:
    code = assembly.code
    loop = code.main_loop()
    path = loop.path if loop else ()
    lines = launch.loop_packed_bytes / LINE if loop else 0.0
    per_line = launch.warps / lines if lines else 0.0
    told = path if lines else range(len(code.instructions))
    pipes = {name: per_line * count for name, count in code.pipes(path).items()}
    return CompiledKernel(
        kernel=launch.kernel,
        arch=arch,
        gpu=GPUS[arch].name,
        triton=str(compiler().__version__),
        warps=launch.warps,
        stages=stages,
        registers=assembly.registers,
        spills=code.spills,
        stack=assembly.stack,
        shared_bytes=int(shared),
        instructions=len(code.instructions),
        straight_instructions=len(code.straight),
        loop_spills=code.counts(path).get("local", 0),
        loop_instructions=len(path),
        guarded_instructions=len(loop.body) - len(path) if loop else 0,
        loop_packed_bytes=launch.loop_packed_bytes,
        loop_copied_bytes=code.copied(path) * launch.warps,
        loop_mma=code.counts(path).get("mma", 0),
        hidden_mma=sum(code.instructions[at].hidden for at in (loop.body if loop else ())),
        instructions_per_byte=len(path) * per_line / LINE,
        slots=len(path) * per_line,
        mma=pipes["mma"],
        predicted_share=predicted_share(arch, pipes) if lines else None,
        cubin_bytes=len(assembly.cubin),
        shares=shares(arch, pipes) if lines else {},
        counts=code.counts(told),
        pipes=pipes,
        loads=code.loads(told),
    )


def _run_task(task: Mapping[str, Any]) -> dict[str, Any]:
    launch = Launch.from_json(task["launch"])
    try:
        return asdict(compile_text(Path(task["path"]), [launch], task["arch"])[0])
    except BackendError as error:
        return {"failure": str(error)}


def _run(tasks: Sequence[Mapping[str, Any]], workers: int) -> list[dict[str, Any]]:
    """Every task's answer, in order.  Workers are spawned, as a forked one would share LLVM's state."""
    if workers <= 1 or len(tasks) <= 1:
        return [_run_task(task) for task in tasks]
    with ProcessPoolExecutor(min(workers, len(tasks)), mp_context=get_context("spawn")) as pool:
        return list(pool.map(_run_task, tasks))


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m kvdsl.codegen.aot FILE LAUNCHES.json --arch sm_90`, or `--json` with a request on standard input."""
    parser = argparse.ArgumentParser(prog="kvdsl.codegen.aot", description="Compile generated kernels without a GPU.")
    parser.add_argument("file", nargs="?", help="generated Python file")
    parser.add_argument("launches", nargs="?", help="JSON list of launches")
    parser.add_argument("--arch", nargs="+", default=["sm_90"], choices=ARCHES)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print JSON; without FILE read a request from stdin")
    given = parser.parse_args(arguments)
    if given.file is None:
        request = json.load(sys.stdin)
        print(_ANSWER + json.dumps(_run(request["tasks"], request["workers"])))
        return 0
    if given.launches is None:
        parser.error("LAUNCHES.json is missing: a list of objects with the fields of kvdsl.codegen.launch.Launch")
    launches = json.loads(Path(given.launches).read_text())
    tasks = [{"path": given.file, "launch": launch, "arch": arch} for arch in given.arch for launch in launches]
    answers = _run(tasks, given.workers)
    if given.json:
        print(json.dumps(answers, indent=1))
    for answer in () if given.json else answers:
        print(answer.get("failure") or line(CompiledKernel(**answer)))
    return int(any("failure" in answer for answer in answers))


def line(kernel: CompiledKernel) -> str:
    """One line for people."""
    text = (
        f"{kernel.kernel:14s} {kernel.arch:6s} registers {kernel.registers:3d}  spills {kernel.spills:3d}  "
        f"shared {kernel.shared_bytes:6d}  stages {kernel.stages}  instructions {kernel.instructions:5d}"
    )
    if kernel.predicted_share is None:
        return text
    return f"{text}  slots {kernel.slots:5.1f}  mma {kernel.mma:5.2f}  {kernel.predicted_share:4.0%} of {kernel.gpu}"


if __name__ == "__main__":
    sys.exit(main())
