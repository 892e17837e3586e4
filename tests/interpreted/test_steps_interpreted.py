"""What a step of decoding launches to store a token."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvdsl import schemes
from kvdsl.codegen import build
from kvdsl.codegen.run_kernels import KernelModule
from kvdsl.quantized_cache import QuantizedCache
from kvdsl.shape import Shape

MAPPED = ["turn_keys", "pack_keys", "turn_values", "pack_values"]
LEFT = {"token4": [], "kivi2": [], "fp16": [], "saw_int4": MAPPED[:2], "quarot4": MAPPED}


@pytest.mark.parametrize("name", LEFT)
def test_one_token_of_every_sequence_is_one_launch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which packs what is due of codes of the numbers as they are; of those that are mapped first other kernels do."""
    run, launched = KernelModule._run, list[str]()

    def spied(self: KernelModule, kernel: str, *rest: Any, **more: Any) -> None:
        launched.append(kernel)
        run(self, kernel, *rest, **more)

    cache = QuantizedCache(build(schemes.ALL[name], Shape(64, 2, 4), "triton"), 2, capacity=256)
    x = torch.randn(2, 2, 129, 64, generator=torch.Generator().manual_seed(0)).half()
    cache.append(x[:, :, :128], x[:, :, :128])
    monkeypatch.setattr(KernelModule, "_run", spied)
    cache.append(x[:, :, 128:], x[:, :, 128:])
    assert launched == ["append", *LEFT[name]]
