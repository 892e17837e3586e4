"""Attention in half precision, twice: as a model does it without fused kernels, and by the form of the kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

HALF = 2.0**-10  # twice the rounding unit of float16


def seen_by(queries: int, tokens: int, sliding: int | None, start: int | None) -> Tensor:
    """Which tokens each query sees: bool (queries, tokens)."""
    position = torch.arange(tokens - queries, tokens)[:, None]
    token = torch.arange(tokens)[None]
    seen = (token <= position) & (token >= (start or 0))
    return seen if sliding is None else seen & (token > position - sliding)


def normal_form(
    q: Tensor, mapped: Tensor, keys: Tensor, key_part: Tensor, values: Tensor, value_part: Tensor, *,
    sliding: int | None, start: int | None, softcap: float | None, scale: float | None,
    drawn: tuple[torch.Generator, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Attention by the kernels' form q.k^ = s*(q.c) + o*sum(q), where the operands of products of codes are rounded to
    float16 and codes are not centred: float64 but for these two roundings.  `mapped` is what multiplies the codes.

    drawn   errors of products q.k^ are drawn at random, with these standard deviations, and of weights up to 2^-11:
            where keys are large the one rounding that the query has says little of how far another form may be off
    """
    group, factor = q.shape[1] // keys.shape[1], (q.shape[3] ** -0.5 if scale is None else scale) * math.log2(math.e)
    exact = q.double()
    held, part = (x.repeat_interleave(group, 1).transpose(2, 3) for x in (keys, key_part))
    moved = ((mapped * factor).to(torch.float16).double() / factor - mapped) @ part
    if drawn is not None:
        moved = torch.randn(moved.shape, generator=drawn[0], dtype=torch.float64) * drawn[1]
    scores = (exact @ held + moved) * (factor / math.log2(math.e))
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    shares = scores.masked_fill(~seen_by(q.shape[2], keys.shape[2], sliding, start), -math.inf)
    shares = (shares - shares.amax(-1, keepdim=True)).exp().nan_to_num(0.0)
    weights = shares.to(torch.float16).double()
    if drawn is not None:
        weights = shares * (1 + (torch.rand(shares.shape, generator=drawn[0], dtype=torch.float64) - 0.5) * HALF)
    held, part = (x.repeat_interleave(group, 1) for x in (values, value_part))
    return ((shares @ held + (weights - shares) @ part) / shares.sum(-1, keepdim=True)).nan_to_num(0.0)


def eager(
    q: Tensor, keys: Tensor, values: Tensor, dtype: torch.dtype, *, sliding: int | None, start: int | None,
    softcap: float | None, scale: float | None,
) -> Tensor:  # fmt: skip
    """Attention as a model without fused kernels does it: products in its dtype, softmax in float32, rounded."""
    group = q.shape[1] // keys.shape[1]
    k, v = (x.to(dtype).repeat_interleave(group, 1) for x in (keys, values))
    scores = (q @ k.transpose(2, 3)) * (q.shape[3] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    seen = seen_by(q.shape[2], k.shape[2], sliding, start)
    shares = scores.float().masked_fill(~seen, -math.inf).softmax(-1).nan_to_num(0.0)
    return (shares.to(dtype) @ v).double()
