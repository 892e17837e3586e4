"""One context over several ranks in Triton's interpreter: queries before, among and behind a rank's tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from context_cases import Ranks, Step, driven, scheme_of

from kvdsl.codegen import build
from kvdsl.quantized_cache import QuantizedCache
from kvdsl.shape import Shape

SHAPE = Shape(64, kv_heads=1, q_heads=2, dtype="fp32")
PLAN = [Step(100, 3, (100, 31)), Step(1, 1), Step(20, 20, (20, 9))]


def test_attention_of_several_ranks_is_that_of_one_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = {backend: build(scheme_of("stored"), SHAPE, backend=backend) for backend in ("torch", "triton")}

    def fresh(backend: Any) -> QuantizedCache:
        return QuantizedCache(kernels[backend], 2, device="cpu", capacity=512)

    want = driven(fresh("torch"), 2, PLAN, SHAPE)
    for got, one in zip(driven(Ranks(2, lambda: fresh("triton"), monkeypatch), 2, PLAN, SHAPE), want, strict=True):
        there = one[1].isfinite()
        assert torch.equal(got[1].isfinite(), there)
        assert torch.allclose(got[1][there], one[1][there], rtol=0, atol=4e-3)  # of products in half precision
        assert torch.allclose(got[0], one[0], rtol=0, atol=4e-3)
