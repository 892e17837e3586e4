"""Launches past Triton's own dispatch: what Triton would compile another kernel for is never launched with this one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler.compiler import make_backend  # noqa: E402
from triton.runtime.jit import JITFunction, create_function_from_signature  # noqa: E402

from kvdsl.codegen import relaunch  # noqa: E402
from kvdsl.codegen.relaunch import Compiled  # noqa: E402


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

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *given, stream: self.launched.append((grid, given, stream))


@settings(max_examples=200, derandomize=True, deadline=None)
@given(first=ARGUMENTS, second=ARGUMENTS)
def test_what_triton_compiles_twice_is_two_kernels(bound: Any, first: dict[str, Any], second: dict[str, Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(relaunch, "driver", Driver())
        kernels, known = [Kernel(), Kernel()], Compiled(written.__code__.co_varnames)
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
    kernels, known = list[Kernel](), Compiled(("rows_ptr", "tokens", "scaling"))

    def dispatched() -> Kernel:
        kernels.append(Kernel())
        return kernels[-1]

    for tokens, scaling in ((33, 0.5), (34, 0.5), (35, 0.25)):
        known.launch((1,), {"rows_ptr": MEMORY[torch.int32], "tokens": tokens, "scaling": scaling}, dispatched)
    assert len(kernels) == 1 and len(kernels[0].launched) == 2
    driver.device = 1
    known.launch((1,), {"rows_ptr": MEMORY[torch.int32], "tokens": 33, "scaling": 0.5}, dispatched)
    assert len(kernels) == 2
