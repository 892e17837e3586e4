"""Vectors of low rank in torch: found in every block at once, and multiplied out."""

from __future__ import annotations

import torch
from torch import Tensor

from .host import finite

LEAST = 2.0**-60  # of a vector's square


def factors(x: Tensor, start: Tensor, tokens: int, loops: int, factor: float) -> tuple[Tensor, Tensor]:
    """Rows a (n, H, T, rank) and vectors b (n, H, T / tokens, rank, D), float16, of x (n, H, T, D), from the first
    vectors (rank, D): subspace iteration in float64.  A NaN spoils its block."""
    blocks = x.unflatten(2, (-1, tokens))
    spoilt = torch.isnan(blocks).any(-1).any(-1)[..., None]
    blocks = finite(blocks).to(torch.float64)
    b = start.to(torch.float64).unbind()
    for _ in range(loops):
        a = list[Tensor]()
        for vector in b:
            row = (blocks * vector[..., None, :]).sum(-1)
            whole = row.square().sum(-1, keepdim=True)
            for before in 2 * a:
                row = row - before * (before * row).sum(-1, keepdim=True)
            square = row.square().sum(-1, keepdim=True)
            there = square > whole * LEAST
            a.append(torch.where(there, row / torch.where(there, square, 1.0).sqrt(), 0.0))
        b = tuple((blocks * row[..., None]).sum(-2) for row in a)
    rows = torch.where(spoilt[..., None], torch.nan, _half(torch.stack(a, -1) * factor))
    return rows.flatten(2, 3), _half(torch.stack(b, -2) / factor)


def _half(x: Tensor) -> Tensor:
    """float64 numbers as float32, then float16 ones; a zero has no sign."""
    return x.to(torch.float32).to(torch.float16) + 0.0


def multiplied(a: Tensor, b: Tensor) -> Tensor:
    """Rows (..., blocks, tokens, rank) times vectors (..., blocks, rank, D), float32 (..., T, D)."""
    return (a.to(torch.float64) @ b.to(torch.float64)).to(torch.float32).flatten(-3, -2)
