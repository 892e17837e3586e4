"""Kernels are launched with what they are compiled for ahead of time: the type of every tensor is its signature's.

Triton compiles a kernel anew for other types, so nothing else would tell that ahead of time another one was proven.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from walked import walked

from kvdsl.codegen.launch import Launch
from kvdsl.codegen.launches import launches
from kvdsl.codegen.run_kernels import KernelModule
from kvdsl.shape import Shape

SHAPE = Shape(64, kv_heads=1, q_heads=2)
NAMES = ("fp16", "kivi2_sinks", "kvtq", "qjl", "gear2", "kvquant3", "kitty", "polar", "skvq2", "zipcache")
"""Of codes, and of every way in which the host makes rows."""
TYPES = {
    torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64", torch.uint8: "*u8", torch.int16: "*i16",
    torch.int32: "*i32",
}  # fmt: skip
UNREAD = ("decode", "extend")
"""Their arguments are all that is asked here: what they would write decides nothing that is launched behind them."""


@pytest.mark.parametrize("name", NAMES)
def test_tensors_have_the_types_of_the_signature(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run, other, known = KernelModule._run, set[str](), dict[KernelModule, dict[str, Launch]]()

    def spied(
        self: KernelModule, kernel: str, grid: tuple[int, ...], given: Mapping[str, Any], *rest: Any, **more: Any
    ) -> None:
        if self not in known:
            known[self] = {one.kernel: one for one in launches(self.plan, inspect.getsource(self.module))}
        signature = dict(known[self][kernel].signature)
        other.update(
            f"{kernel}: {name} is {TYPES[value.dtype]}, {signature[name]} in its signature"
            for name, value in given.items()
            if isinstance(value, torch.Tensor) and name in signature and TYPES[value.dtype] != signature[name]
        )
        if kernel not in UNREAD:
            run(self, kernel, grid, given, *rest, **more)

    monkeypatch.setattr(KernelModule, "_run", spied)
    walked(name, SHAPE, "cpu", chunks=(65, 1), steps=1)
    assert not other
