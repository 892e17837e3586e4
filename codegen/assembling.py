"""NVIDIA's assembler under several settings: Triton makes a kernel's PTX once, and the assembler alone runs again.

The same search chooses ahead of time and where kernels run, so that figures are those of what is launched.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvdsl.errors import BackendError

from . import sass
from .launch import assembled
from .occupancy import RESERVED, held, more_registers

_KEPT = "kernel.cubin"
_BODY = re.compile(r"(\.entry\b[^{]*)\{")


@dataclass(frozen=True)
class Assembly:
    """Machine code of one kernel, the registers of a thread and its bytes of local memory."""

    cubin: bytes
    code: sass.Code
    registers: int
    stack: int

    @property
    def spilled(self) -> bool:
        return self.code.spills > 0 or self.stack > 0


def fewest_spills(binary: Any, settings: Sequence[str | None]) -> tuple[str | None, Assembly]:
    """The first setting of the assembler that leaves nothing in local memory, else that with the fewest instructions on
    it, and what it gives.  `binary` is Triton's compiled kernel under the first setting.

    Raises BackendError where the assembler or the disassembler cannot be run alone.
    """
    best, least = settings[0], read(binary.asm["cubin"])
    for setting in settings[1:]:
        if not least.spilled:
            break
        other = read(assembled_again(binary, setting))
        if (other.spilled, other.code.spills) < (least.spilled, least.code.spills):
            best, least = setting, other
    return best, least


def roomier(binary: Any, assembly: Assembly, warps: int, shared: int) -> Assembly:
    """A kernel with all the registers that a GPU has for it whose programs may have so many bytes of shared memory, see
    `occupancy.more_registers`; as it was where the assembler then moves some to memory, as it does for few kernels."""
    if assembly.spilled:
        return assembly
    programs = held(assembly.registers, binary.metadata.shared, warps, shared + RESERVED)
    setting = more_registers(assembly.registers, warps, programs)
    other = assembly if setting is None else read(assembled_again(binary, setting))
    return assembly if other.spilled else other


def under(binary: Any, setting: str | None) -> Any:
    """Triton's compiled kernel as it would be under this setting, on the current GPU; itself under none.

    Only the assembler runs: of a large kernel all that Triton does before it takes many times as long.
    """
    if setting is None:
        return binary
    from triton.compiler.compiler import CompiledKernel

    name = f"{binary.metadata.name}.cubin"
    kernel = CompiledKernel(binary.src, {**binary.metadata_group, name: str(_kept(binary, setting))}, binary.hash)
    kernel._init_handles()  # now, and not while a graph is captured
    return kernel


def assembled_again(binary: Any, setting: str | None) -> bytes:
    """The machine code of Triton's compiled kernel, had it been compiled under this setting."""
    return _kept(binary, setting).read_bytes()


def _kept(binary: Any, setting: str | None) -> Path:
    """A file of that machine code in Triton's cache.

    Triton's own last stage makes it, so that the assembler and all its other options are those of this Triton.
    """
    from triton.compiler.compiler import make_backend
    from triton.runtime.cache import get_cache_manager

    metadata = binary.metadata._asdict()
    try:
        backend = make_backend(binary.metadata.target)
        # what is kept of a kernel may name a library of an environment that is gone; it was linked before
        own = {"extern_libs": None, "ptx_options": None, **assembled(setting)}
        options = backend.parse_options({**metadata, **own})
        ptx = _limited(binary.asm["ptx"], options.maxnreg)
        key = "\0".join((ptx, backend.hash(), options.hash()))
        kept = get_cache_manager(hashlib.sha256(key.encode()).hexdigest())
        if file := kept.get_file(_KEPT):
            return Path(file)
        stages: dict[str, Any] = {}
        backend.add_stages(stages, options, binary.src.language)
        return Path(kept.put(stages["cubin"](ptx, metadata), _KEPT))
    except Exception as error:  # Triton raises many kinds, and its insides differ from version to version
        message = " ".join(str(error).split()) or "no message"
        raise BackendError(f"the assembler does not run alone: {type(error).__name__}: {message[-600:]}") from error


def _limited(ptx: str, registers: int | None) -> str:
    """The text as Triton writes it for `maxnreg`: a directive of the kernel, nothing else."""
    if registers is None or ".maxnreg" in ptx:
        return ptx
    return _BODY.sub(rf"\g<1>.maxnreg {registers}\n{{", ptx, count=1)


def read(cubin: bytes) -> Assembly:
    """What stands in a kernel's machine code."""
    with tempfile.TemporaryDirectory(prefix="kvdsl-") as folder:
        file = Path(folder) / _KEPT
        file.write_bytes(cubin)
        usage = _output([_tool("cuobjdump"), "--dump-resource-usage", str(file)])
        code = sass.parse(_output([_tool("nvdisasm"), "-c", str(file)]))
    resources = {name: int(value) for name, value in sass.RESOURCE.findall(usage)}
    return Assembly(cubin, code, resources["REG"], resources["STACK"] + resources.get("LOCAL", 0))


def _tool(name: str) -> str:
    """Path of a tool of the Triton wheel ("cuobjdump", "nvdisasm")."""
    import triton

    try:
        return str(getattr(triton.knobs.nvidia, name).path)
    except (AttributeError, RuntimeError):
        path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise BackendError(f"{name} is not in this Triton ({triton.__version__}); the official Linux wheel has it")
    return str(path)


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise BackendError(f"{Path(command[0]).name} cannot be run ({error.strerror})") from error
    if done.returncode:
        raise BackendError(f"{Path(command[0]).name} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
