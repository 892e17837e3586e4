"""What kvdsl.roundtrip, scores and attend must agree on with the reference, for either backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import kvdsl
from kvdsl import Recent, Scheme, Sinks, Store, Uniform, per_channel, per_tensor, per_token

BATCH, HEADS, GROUP, DIM = 2, 2, 2, 32
TOKENS = 96
SCHEMES = {
    "whole": Scheme(
        keys=Store(Uniform(2), scale=per_channel(tokens=32)),
        values=Store(Uniform(3), scale=per_token(channels=16)),
        recent=Recent(32),
        sinks=Sinks(3),
    ),
    "rolling": Scheme(both=Store(Uniform(4), scale=per_token(range="absmax")), recent=Recent(5), prefill="stored"),
    "static": Scheme(both=Store(Uniform(8), scale=per_tensor(when="calibrated", dtype="fp32"))),
    "floats": kvdsl.load("fp16"),
}


def tensors(
    queries: int = 1, dtype: torch.dtype = torch.float32, tokens: int = TOKENS
) -> tuple[Tensor, Tensor, Tensor]:
    """(q, k, v)."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((HEADS * GROUP, queries), (HEADS, tokens), (HEADS, tokens))
    q, k, v = (torch.randn(BATCH, *shape, DIM, generator=generator).to(dtype) for shape in shapes)
    return q, k, v


def agrees_on_roundtrip(name: str, window: bool, **options: Any) -> None:
    """Bit for bit."""
    scheme, (_, k, v) = SCHEMES[name], tensors(dtype=torch.float16)
    params = kvdsl.calibrate(scheme, k, v)
    found = kvdsl.roundtrip(scheme, k, v, window=window, params=params, **options)
    right = kvdsl.reference.roundtrip(scheme, k, v, window=window, params=params)
    for got, want in zip(found, right, strict=True):
        assert got.dtype == torch.float32 and torch.equal(got.double(), want)


def agrees_on_scores(name: str, window: bool, **options: Any) -> None:
    """Within what half-precision products of the kernels allow."""
    scheme, (q, k, v) = SCHEMES[name], tensors(queries=3)
    params = kvdsl.calibrate(scheme, k, v)
    found = kvdsl.scores(scheme, q, k, window=window, params=params, **options)
    right = kvdsl.reference.scores(scheme, q, k, window=window, params=params)
    assert found.shape == right.shape and (found - right).abs().max() < 0.05


def agrees_on_attend(name: str, window: bool, queries: int, **options: Any) -> None:
    """Within what half-precision products of the kernels allow."""
    scheme, (q, k, v) = SCHEMES[name], tensors(queries)
    params = kvdsl.calibrate(scheme, k, v)
    places = {key: options.pop(key) for key in ("backend",) if key in options}
    out, lse = kvdsl.attend(scheme, q, k, v, window=window, params=params, **options, **places)
    right, right_lse = kvdsl.reference.attend(scheme, q, k, v, window=window, params=params, **options)
    assert out.dtype == q.dtype and lse.dtype == torch.float32
    assert (out - right).abs().max() < 5e-3 and (lse - right_lse).abs().max() < 5e-3
