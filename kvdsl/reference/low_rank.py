"""Vectors of low rank: the rows of a block as numbers times a few vectors, found by subspace iteration.

GEAR (arXiv 2403.05527, section 3; power iteration of its code): X ~ Q Q^T X with Q an orthonormal basis of X P, and P
the X^T Q of the iteration before.  Here every iteration makes its basis orthonormal, which changes no space.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvdsl.codes import LowRank
from kvdsl.matrices import start

from .rounding import LARGEST_INPUT, f32

LEAST = 2.0**-30
"""Of a vector, what must be left of it beside those before it: float32 numbers tell no less."""


def factors(x: Tensor, code: LowRank, first: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(a, b) of x (B, H, T, D), whole blocks: a (B, H, T, rank), b (B, H, blocks, rank, D), float64 holding float16
    numbers.  A block with a NaN has no a: all of it is NaN.  `first`: other vectors (..., D, rank) to begin with."""
    blocks = x.unflatten(2, (-1, code.tokens))
    spoilt = blocks.isnan().any(-1).any(-1)
    blocks = torch.where(blocks.isnan(), 0.0, blocks).clamp(-LARGEST_INPUT, LARGEST_INPUT)
    p = f32(start(code.rank, x.shape[3], code.seed)).mT if first is None else first.double()
    p = p.expand(*blocks.shape[:3], -1, -1)
    for _ in range(code.loops):
        basis = orthonormal(blocks @ p)
        p = blocks.mT @ basis
    a = torch.where(spoilt[..., None, None], torch.nan, basis * code.factor)
    return _half(a).flatten(2, 3), _half(p.mT / code.factor)


def orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis of columns (..., n, k), one after the other, twice each; 0 for one that those before it
    already give."""
    found: list[Tensor] = []
    for i in range(columns.shape[-1]):
        rest = columns[..., i]
        length = rest.norm(dim=-1, keepdim=True)
        for _ in range(2):
            for unit in found:
                rest = rest - unit * (unit * rest).sum(-1, keepdim=True)
        size = rest.norm(dim=-1, keepdim=True)
        found.append(torch.where(size > length * LEAST, rest / size, 0.0))
    return torch.stack(found, -1)


def multiplied(a: Tensor, b: Tensor) -> Tensor:
    """What is read, float64 holding float32 numbers (B, H, T, D)."""
    return f32((a.unflatten(2, (b.shape[2], -1)) @ b).flatten(2, 3))


def _half(x: Tensor) -> Tensor:
    """float16 numbers of float32 ones; a zero has no sign."""
    return f32(x).clamp(-LARGEST_INPUT, LARGEST_INPUT).to(torch.float16).to(torch.float64) + 0.0
