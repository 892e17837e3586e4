"""Launches past Triton's own dispatch: what Triton would compile another kernel for is never launched with this one."""

from __future__ import annotations

from collections.abc import Mapping
from threading import current_thread, main_thread
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler.compiler import make_backend  # noqa: E402
from triton.runtime.jit import JITFunction, create_function_from_signature  # noqa: E402

from kvdsl.codegen import relaunch, run_kernels  # noqa: E402
from kvdsl.codegen.launches import ASSEMBLER, stages  # noqa: E402
from kvdsl.codegen.plan import plan_for  # noqa: E402
from kvdsl.codegen.relaunch import Compiled  # noqa: E402
from kvdsl.schemes import ALL  # noqa: E402
from kvdsl.shape import Shape  # noqa: E402


def written(rows_ptr, table_ptr, tokens, scaling, ROWS):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201, N803
    """Arguments of each kind that generated kernels have."""


MEMORY = {dtype: torch.empty(64, dtype=dtype) for dtype in (torch.float16, torch.int32)}
NUMBERS = st.sampled_from([0, 1, 2, 15, 16, 48, 2**31 - 1, 2**31, 2**31 + 16, 2**40])
POINTERS = st.none() | st.builds(
    lambda dtype, at: MEMORY[dtype][at:], st.sampled_from(sorted(MEMORY, key=str)), st.integers(0, 16)
)
ARGUMENTS = st.fixed_dictionaries(
    {
        "rows_ptr": POINTERS, "table_ptr": POINTERS, "tokens": NUMBERS,
        "scaling": st.sampled_from([0.5, 1.0, 16.0]), "ROWS": st.sampled_from([8, 24]),
    }
)  # fmt: skip


class Driver:
    """Of as many devices as are asked for."""

    device = 0

    @property
    def active(self) -> Driver:
        return self

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 100 + device


@pytest.fixture(scope="module")
def bound() -> Any:
    """Arguments -> what Triton compiles by."""
    names = written.__code__.co_varnames
    written.__annotations__["ROWS"] = triton.language.constexpr
    function = JITFunction(written)
    backend = make_backend(GPUTarget("cuda", 90, 32))
    binder = create_function_from_signature(function.signature, function.params, backend)
    return lambda values: binder(*(values[name] for name in names))[1]


class Kernel:
    """A compiled kernel that notes how it is launched."""

    def __init__(self, spills: int = 0) -> None:
        self.asm: dict[str, str] = {}
        self.n_spills = spills
        self.launched: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *given, stream: self.launched.append((grid, given, stream))


def itself(kernel: Kernel) -> Kernel:
    """Triton's kernel as it is."""
    return kernel


@settings(max_examples=200, derandomize=True, deadline=None)
@given(first=ARGUMENTS, second=ARGUMENTS)
def test_what_triton_compiles_twice_is_two_kernels(bound: Any, first: dict[str, Any], second: dict[str, Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(relaunch, "driver", Driver())
        kernels, known = [Kernel(), Kernel()], Compiled(written.__code__.co_varnames, itself)
        known.launch((1,), first, lambda: kernels[0])
        known.launch((2, 3), second, lambda: kernels[1])
    shared = bool(kernels[0].launched)
    assert not shared or bound(first) == bound(second)
    if shared:
        pointers = [None if x is None else x.data_ptr() for x in (second["rows_ptr"], second["table_ptr"])]
        given = (*pointers, second["tokens"], second["scaling"], second["ROWS"])
        assert kernels[0].launched == [((2, 3, 1), given, 100)]


def test_launches_that_differ_in_numbers_alone_share_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a step would be dispatched anew with every token; but each GPU has kernels of its own."""
    driver = Driver()
    monkeypatch.setattr(relaunch, "driver", driver)
    kernels, known = list[Kernel](), Compiled(("rows_ptr", "tokens", "scaling"), itself)

    def dispatched() -> Kernel:
        kernels.append(Kernel())
        return kernels[-1]

    for tokens, scaling in ((33, 0.5), (34, 0.5), (35, 0.25)):
        known.launch((1,), {"rows_ptr": MEMORY[torch.int32], "tokens": tokens, "scaling": scaling}, dispatched)
    assert len(kernels) == 1 and len(kernels[0].launched) == 2
    driver.device = 1
    known.launch((1,), {"rows_ptr": MEMORY[torch.int32], "tokens": 33, "scaling": 0.5}, dispatched)
    assert len(kernels) == 2


def test_what_is_made_of_a_kernel_is_launched_from_the_first_time_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that it is on the GPU before a graph is captured."""
    monkeypatch.setattr(relaunch, "driver", Driver())
    triton_s, again = Kernel(), Kernel()
    known = Compiled(("tokens",), {triton_s: again}.__getitem__)
    known.launch((1,), {"tokens": 33}, lambda: triton_s)
    known.launch((2,), {"tokens": 34}, lambda: triton_s)
    assert [grid for grid, _, _ in again.launched] == [(1, 1, 1), (2, 1, 1)] and not triton_s.launched


class Jitted:
    """A kernel of a module: notes what it is compiled for, and what is launched, in which thread."""

    def __init__(self, spills: Mapping[int, int] | None = None) -> None:
        self.calls: list[tuple[bool, int, int, bool]] = []
        self.spills = spills or {}

    def run(self, *, grid: Any, warmup: bool, num_warps: int, num_stages: int, **values: Any) -> Any:
        self.calls.append((warmup, num_warps, num_stages, current_thread() is main_thread()))
        if warmup and values["tokens"] < 0:
            raise RuntimeError("does not compile")
        return Kernel(self.spills.get(num_stages, 0))


def launching(decode: Jitted, monkeypatch: pytest.MonkeyPatch) -> run_kernels.KernelModule:
    """A module of this kernel, on a GPU that there is not."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(relaunch, "driver", Driver())
    monkeypatch.setattr(run_kernels, "overlapping", lambda device: False)
    plan = plan_for(ALL["token4"], Shape(128, 2, 8, "fp16"))
    module = run_kernels.KernelModule(plan, cast(Any, SimpleNamespace(decode=decode)), "")
    module.arguments, module._others = {"decode": ("tokens", "STAGES")}, {"decode": []}
    module.on_gpu = True
    return module


@pytest.mark.parametrize(("tokens", "threaded"), [(5, True), (-5, True), (5, False)])
def test_a_kernel_that_is_launched_soon_is_compiled_in_the_meantime(
    tokens: int, threaded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it will be launched, once, by another thread where Python allows it; who launches is told what fails."""
    monkeypatch.setattr(run_kernels, "THREADED", threaded)
    decode = Jitted()
    module = launching(decode, monkeypatch)
    usual, first = module.warps("decode"), stages("decode", module.plan)[0]
    for times, meanwhile in ((2, True), (1, False), (2, False), (2, True), (2, False)):
        module._run("decode", (1,), {"tokens": tokens}, None, {}, times=times, meanwhile=meanwhile)
    launched = [call for call in decode.calls if not call[0]]
    assert [call for call in decode.calls if call[0]] == [(True, 2 * usual, first, False)] * threaded
    assert launched[:2] == [(False, usual, first, True), (False, 2 * usual, first, True)]


def test_what_was_found_for_a_kernel_that_spills_is_ready_behind_its_first_launch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The depth and the setting that spill least, whichever was tried last: nothing is loaded in the second launch,
    which a graph may capture."""
    decode = Jitted({3: 9, 2: 5, 1: 7})
    module = launching(decode, monkeypatch)
    made = list[Kernel]()

    def under(kernel: Kernel, setting: str | None) -> Kernel:
        if setting is None:
            return kernel
        made.append(Kernel(kernel.n_spills - 1))
        return made[-1]

    monkeypatch.setattr(run_kernels, "fewest_spills", lambda kernel, settings: (settings[2], None))
    monkeypatch.setattr(run_kernels, "under", under)
    module._run("decode", (1,), {"tokens": 5}, None, {})
    assert module.settings["decode", None, 1] == (2, ASSEMBLER[2])
    before = len(made)
    module._run("decode", (2,), {"tokens": 6}, None, {})
    assert [depth for _, _, depth, _ in decode.calls] == [3, 2, 1] and len(made) == before
    assert [grid for grid, _, _ in made[-1].launched] == [(1, 1, 1), (2, 1, 1)] and made[-1].n_spills == 4
