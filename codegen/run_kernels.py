"""Launching generated Triton kernels: their arguments, and the depth and assembler settings that spill least."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cached_property, partial
from threading import Thread
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from triton.runtime.errors import OutOfResources

from kvdsl.errors import BackendError
from kvdsl.interpreting import interpreted
from kvdsl.kernels import Params
from kvdsl.scheme import SIDES

from .assembling import fewest_spills, under
from .host_vectors import table_words
from .launch import ATTEND, DEPTH
from .launches import ASSEMBLER, GIVEN_POINTERS, arguments, fused, stages, warps
from .occupancy import more_registers, residents
from .operands import misread
from .overlap import overlapped, overlapping
from .plan import Plan
from .relaunch import Compiled
from .schedules import MODEL, Bucket, known

VIEWS = {
    "pool8_ptr": torch.uint8, "pool16_ptr": torch.int16, "pool32_ptr": torch.int32,
    "pool_fp16_ptr": torch.float16, "pool_fp32_ptr": torch.float32,
}  # fmt: skip
OF_SIDES = tuple(f"{side}_" for side in SIDES)
"""How names of arguments begin that come from the parameters."""
COLUMNS = WeakTensorKeyDictionary()
"""Maps -> the same by columns, float64: made once for those that are used again in every step."""
INNER = {"outliers_": ".outliers.store", "residual_": ".residual"}
"""How an argument's name goes on behind a side's -> its term's place behind the side's."""
THREADED = (3, 11, 8) <= sys.version_info < (3, 12) or sys.version_info >= (3, 12, 2)
"""Whether kernels may be compiled in several threads: `ast.parse` of an older Python fails at times where two are in it
(python/cpython#106905)."""
Setting = tuple[int, str | None]
"""Depth of the pipeline, setting of the assembler."""
Asked = tuple[str, int | None, int]
"""A kernel, the depth that timing found for it (None: the one that spills least), and its warps over the usual."""


class KernelModule:
    """The kernels of one generated module."""

    def __init__(self, plan: Plan, module: ModuleType, source: str) -> None:
        self.plan, self.module = plan, module
        self.arguments = arguments(source)
        self.schedules = known(plan, source)
        self.settings: dict[Asked, Setting] = {}  # those found best
        self.residents: dict[Asked, int] = {}  # programs that a processor of the GPU holds at once
        self.compiled: dict[Asked, Compiled] = {}  # under those settings
        self._coming: dict[Asked, Thread] = {}  # compiled in the meantime
        self._warps: dict[str, int] = {}
        self._interpreted = interpreted()
        # arguments that are no caller's: of pages, and of the parameters
        self._others = {
            kernel: [name for name in names if name in VIEWS or name in GIVEN_POINTERS or name.startswith(OF_SIDES)]
            for kernel, names in self.arguments.items()
        }

    @property
    def schedule(self) -> str:
        """See KernelSet."""
        return self.schedules.source

    def schedule_for(self, batch: int, tokens: int) -> str:
        """See KernelSet."""
        return self.schedules.source if Bucket.of(batch, tokens) in self.schedules.best else MODEL

    @cached_property
    def on_gpu(self) -> bool:
        """Whether there is one to ask, and kernels may differ by it."""
        return torch.cuda.is_available()

    def warps(self, kernel: str) -> int:
        """The usual ones of a program."""
        if kernel not in self._warps:
            self._warps[kernel] = warps(kernel, self.plan)
        return self._warps[kernel]

    def _run(
        self, kernel: str, grid: tuple[int, ...], given: Mapping[str, Any], pool: Tensor | None, params: Params,
        depth: int | None = None, times: int = 1, *, meanwhile: bool = False,
    ) -> None:  # fmt: skip
        """Launch a kernel, at the depth that is asked for if that fits the GPU, with `times` its usual warps;
        `meanwhile`: only have it compiled, in a thread, in which time another one may be compiled and launched."""
        if 0 in grid:
            return
        values = self._values(kernel, given, pool, params)
        asked: Asked = (kernel, depth, times)

        def launch(depth: int, warmup: bool = False) -> Any:
            """Run the kernel by Triton's dispatch, under the usual setting of the assembler, or compile it alone; gives
            what was compiled."""
            values[DEPTH] = depth
            found = {name: values[name] for name in self.arguments[kernel]}
            found |= {name: found[name].view(VIEWS[name]) for name in VIEWS if name in found}
            options = self._options(kernel, times) | {"num_stages": depth}
            return getattr(self.module, kernel).run(grid=grid, warmup=warmup, **found, **options)

        if meanwhile:
            if asked not in self.settings and self.on_gpu and THREADED:
                tried = stages(kernel, self.plan)[0] if depth is None else depth
                self._coming[asked] = _thread(partial(launch, tried, warmup=True))
            return
        if asked in self._coming:
            self._coming.pop(asked).join()
        if asked not in self.settings:
            self.settings[asked], first = self._best(asked, launch)
            if not self._interpreted:
                values[DEPTH], setting = self.settings[asked]
                self.compiled[asked] = Compiled(self.arguments[kernel], partial(under, setting=setting))
                self.compiled[asked].launch(grid, values, lambda: first)
        elif self._interpreted:
            launch(self.settings[asked][0])
        else:
            values[DEPTH] = self.settings[asked][0]
            self.compiled[asked].launch(grid, values, partial(launch, values[DEPTH]))

    def _values(self, kernel: str, given: Mapping[str, Any], pool: Tensor | None, params: Params) -> dict[str, Any]:
        """All arguments; of pages the pool, whatever their type is."""
        values = dict(given)
        for name in self._others[kernel]:
            if name in VIEWS:
                assert pool is not None
                values[name] = pool
            elif name in GIVEN_POINTERS:
                table = params[GIVEN_POINTERS[name]]
                sums = self.plan.side(name.rpartition("_")[0].rpartition("_")[0]).alphabet.sums
                values[name] = table if sums else table_words(table)
            elif name not in values:
                values[name] = _parameter(name, params)
        return values

    def _options(self, kernel: str, times: int) -> dict[str, Any]:
        """Options of Triton."""
        found: dict[str, Any] = {"num_warps": times * self.warps(kernel), "enable_fp_fusion": fused(kernel)}
        if self.on_gpu and overlapped(kernel, self.plan) and overlapping(torch.cuda.current_device()):
            found["launch_pdl"] = True
        return found

    def _best(self, asked: Asked, launch: Callable[[int], Any]) -> tuple[Setting, Any]:
        """Launch a kernel for the first time, at one depth after the other: that and the setting which spill least, and
        what Triton compiled."""
        kernel, depth, times = asked
        refused, found = None, dict[int, tuple[int, str | None, Any]]()
        for tried in (*(() if depth is None else (depth,)), *stages(kernel, self.plan)):
            try:
                first = launch(tried)
            except OutOfResources as error:
                refused = error
                continue
            found[tried] = *_setting(kernel, first), first
            if not found[tried][0] or depth is not None:
                break
        if not found:
            raise BackendError(f"{kernel} does not fit this GPU: {refused}")
        best, wide = min(found, key=lambda one: found[one][0]), times * self.warps(kernel)
        spills, setting, first = found[best]
        if fault := misread(getattr(first, "asm", {}).get("ttgir", "")):
            raise BackendError(f"{kernel}: {fault}; use backend='torch'")
        if (held := residents(under(first, setting), wide)) is not None:
            self.residents[asked] = held
            if kernel in ATTEND and setting is None and not spills:
                setting = _roomier(kernel, first, wide, held)
        return (best, setting), first


def _thread(work: Callable[[], object]) -> Thread:
    """Work of the current GPU in a thread; who waits for it does it again, and is told what fails."""
    device = torch.cuda.current_device()

    def do() -> None:
        torch.cuda.set_device(device)
        with suppress(Exception):
            work()

    thread = Thread(target=do)
    thread.start()
    return thread


def _setting(kernel: str, compiled: Any) -> tuple[int, str | None]:
    """What a kernel spills under the setting of the assembler with which that is least, and the setting."""
    spills = _spills(compiled)
    if not spills:
        return 0, None
    try:
        setting, _ = fewest_spills(compiled, ASSEMBLER)
        return _spills(under(compiled, setting)), setting
    except BackendError as error:
        warnings.warn(f"{kernel} runs with {spills} numbers in memory: {error}", stacklevel=2)
        return spills, None


def _roomier(kernel: str, compiled: Any, warps: int, programs: int) -> str | None:
    """The setting under which a kernel has the registers that so many programs leave it; None where it has them, or
    some would be moved to memory then."""
    more = more_registers(compiled.n_regs, warps, programs)
    try:
        return None if more is None or _spills(under(compiled, more)) else more
    except BackendError as error:
        warnings.warn(f"{kernel} runs with {compiled.n_regs} registers and could have more: {error}", stacklevel=2)
        return None


def _spills(compiled: Any) -> int:
    """Numbers that a kernel keeps in memory for want of registers; none where it was interpreted."""
    return getattr(compiled, "n_spills", 0) or 0


def _parameter(name: str, params: Params) -> Tensor | int:
    """A kernel's argument that comes from the parameters: `keys_scale_ptr`, `keys_encode_ptr`, or how far apart one
    head's map (`keys_stride`) or shift (`keys_shifts`) is from the next; 0 where heads share it."""
    side, _, what = name.removesuffix("_ptr").partition("_")
    while inner := next(filter(what.startswith, INNER), None):
        side, what = side + INNER[inner], what.removeprefix(inner)
    if what.endswith("stride"):
        matrix = params[f"{side}.{'read' if what == 'read_stride' else 'encode'}"]
        return matrix.shape[1] * matrix.shape[2] if matrix.shape[0] > 1 else 0
    if what == "shifts":
        return int(params[f"{side}.encode_shift"].shape[0] > 1)
    if what.endswith("_columns"):
        matrix = params[f"{side}.{what.removesuffix('_columns')}"]
        if matrix not in COLUMNS:
            COLUMNS[matrix] = matrix.mT.to(torch.float64).contiguous()
        columns: Tensor = COLUMNS[matrix]
        return columns
    return params[f"{side}.{what}"]
