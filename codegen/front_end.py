"""Kernels of a generated file as Triton's compiler takes them: loaded, with the types of a launch, aimed at a GPU that
need not be there; and read by its front end alone, which is where types that do not agree are found, in no time."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from kvdsl.errors import BackendError
from kvdsl.interpreting import INTERPRETER, interpreted

from .launch import Launch
from .roofline import GPUS

ARCHES = tuple(GPUS)


class CompileError(BackendError):
    """Kernels that do not compile; `failures` holds one sentence for each."""

    def __init__(self, failures: Sequence[str]) -> None:
        self.failures = tuple(failures)
        super().__init__("\n".join(self.failures))

    def __reduce__(self) -> tuple[type[CompileError], tuple[tuple[str, ...]]]:
        return CompileError, (self.failures,)


def check(arch: str) -> None:
    """Raises BackendError for an architecture that is not known here."""
    if arch not in GPUS:
        raise BackendError(f"architecture {arch!r} is not known here; take one of {', '.join(ARCHES)}")


@cache
def compiler() -> Any:
    """The `triton` package, in a state in which it compiles."""
    if interpreted():
        raise BackendError(f"{INTERPRETER} is set, so Triton cannot compile in this process; use compile_in_child")
    try:
        import triton
        import triton.compiler
        from triton.backends.compiler import GPUTarget  # noqa: F401
    except ImportError as error:
        raise BackendError(f"Triton cannot be imported ({error}); install triton >= 3.6 (Linux)") from error
    return triton


def load(path: Path) -> ModuleType:
    """The module of a generated file, loaded once for each content."""
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise BackendError(f"{path} cannot be read ({error.strerror})") from error
    return _loaded(path.resolve(), f"kvdsl_aot_{digest}")


@cache
def _loaded(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise BackendError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # Triton looks a kernel's globals up in its module
    spec.loader.exec_module(module)
    return module


def source_of(module: ModuleType, launch: Launch, arch: str, stages: int) -> Any:
    """A kernel with the types and constants of a launch.  Raises CompileError where the text has other arguments."""
    if (kernel := getattr(module, launch.kernel, None)) is None:
        raise CompileError([f"{launch.kernel} for {arch}: there is no kernel of this name in {module.__file__}"])
    if (names := [name for name, _ in launch.signature]) != list(kernel.arg_names):
        raise CompileError([f"{launch.kernel} for {arch}: launch has arguments {names}, text {list(kernel.arg_names)}"])
    place = {name: index for index, name in enumerate(names)}
    return compiler().compiler.ASTSource(
        fn=kernel,
        signature=dict(launch.signature),
        constexprs={(place[name],): value for name, value in launch.values(stages).items()},
        attrs={(place[name],): [["tt.divisibility", 16]] for name in launch.aligned},
    )


class _Aim:
    """What Triton asks for its target, where a kernel depends on it: a driver of a GPU that need not be there."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target


@contextmanager
def aimed_at(arch: str) -> Iterator[Any]:
    """The target, which meanwhile is also what kernels are told that ask for it; the driver of a GPU that is there is
    the active one again behind it."""
    triton = compiler()
    driver = triton.runtime.driver
    target = triton.backends.compiler.GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    try:
        before = driver.active
    except RuntimeError:  # there is no GPU, and nothing to give back
        before = None
    driver.set_active(_Aim(target))
    try:
        yield target
    finally:
        if before is not None:
            driver.set_active(before)


@contextmanager
def told(launch: Launch, arch: str) -> Iterator[None]:
    """What Triton raises as one sentence: it raises many kinds, and an assertion of LLVM's Python side is one."""
    try:
        yield
    except BackendError:
        raise
    except OSError as error:
        folder = os.environ.get("TRITON_CACHE_DIR", "~/.triton/cache")
        raise BackendError(f"Triton cannot use its cache folder {folder} ({error}); set TRITON_CACHE_DIR") from error
    except Exception as error:
        message = " ".join(str(error).split()) or "no message"
        raise CompileError([f"{launch.kernel} for {arch}: {type(error).__name__}: {message[-600:]}"]) from error


def read(path: Path, launches: Sequence[Launch], arch: str = "sm_90") -> list[str]:
    """What Triton's front end refuses of the kernels of a generated file, one sentence each: names that branches make
    of unlike shapes, say, which its interpreter does not see.  Nothing is compiled.

    Raises BackendError where this process or this machine cannot, or the architecture is not known.
    """
    check(arch)
    triton, module, failures = compiler(), load(path), list[str]()
    for launch in launches:
        try:
            with told(launch, arch), aimed_at(arch) as target:
                source = source_of(module, launch, arch, launch.stages[0])
                backend = triton.compiler.make_backend(target)
                options = backend.parse_options({"num_warps": launch.warps, "num_stages": launch.stages[0]})
                context = triton._C.libtriton.ir.context()
                triton._C.libtriton.ir.load_dialects(context)
                backend.load_dialects(context)
                codegen = backend.get_codegen_implementation(options)
                source.make_ir(target, options, codegen, backend.get_module_map(), context)
        except CompileError as error:
            failures += error.failures
    return failures
