"""Errors of keys that are fed forward, as `Feedback` says: block by block, each time the best that later channels can
do about the errors so far."""

from __future__ import annotations

import dataclasses as dc

import torch
from torch import Tensor

from kvdsl.scheme import Feedback, Store

from .quantize import Params, quantize
from .rounding import LARGEST_INPUT, f32


def directions(part: Feedback, q: Tensor, heads: int) -> Tensor:
    """Q of every kv head: S V^T of the largest singular values of queries (B, Hq, Q, D), (B, heads, rank, D)."""
    q = torch.where(q.isnan(), 0.0, q.to(torch.float64)).clamp(-LARGEST_INPUT, LARGEST_INPUT)
    group, found = q.shape[1] // heads, torch.zeros(q.shape[0], heads, part.rank, q.shape[3], dtype=torch.float64)
    for b in range(q.shape[0]):
        for head in range(heads):
            rows = q[b, head * group : (head + 1) * group].reshape(-1, q.shape[3])
            _, sizes, right = torch.linalg.svd(rows, full_matrices=False)
            count = min(part.rank, len(sizes))
            found[b, head, :count] = sizes[:count, None] * right[:count]
    return f32(found)


def fed_forward(store: Store, x: Tensor, q: Tensor, params: Params | None) -> Tensor:
    """What is coded in place of keys x (B, H, T, D), whole blocks of tokens, under Q (B, H, rank, D)."""
    part = store.feedback
    assert part is not None
    plain, x = dc.replace(store, feedback=None), x.clamp(-LARGEST_INPUT, LARGEST_INPUT)
    for end in range(part.channels, x.shape[3], part.channels):
        block = slice(end - part.channels, end)
        error = quantize(plain, x, params, "keys").decoded[..., block] - x[..., block]
        error = torch.where(error.isfinite(), error, 0.0)
        later = torch.zeros_like(x[..., end:])
        for b in range(x.shape[0]):
            for head in range(x.shape[1]):
                later[b, head] = _answer(part, q[b, head], error[b, head], block)
        x = torch.cat([x[..., :end], f32(x[..., end:] + later).clamp(-LARGEST_INPUT, LARGEST_INPUT)], -1)
    return x


def _answer(part: Feedback, q: Tensor, error: Tensor, block: slice) -> Tensor:
    """The change y of later channels with the least |y|^2 + weight |Q_later y + Q_block e|^2 for every e of error
    (T, channels): (T, later)."""
    size = q.shape[1] - block.stop
    rows = torch.cat([torch.eye(size, dtype=torch.float64), part.weight**0.5 * q[:, block.stop :]])
    wanted = torch.cat(
        [torch.zeros(size, len(error), dtype=torch.float64), -(part.weight**0.5) * q[:, block] @ error.T]
    )
    return torch.linalg.lstsq(rows, wanted).solution.T
