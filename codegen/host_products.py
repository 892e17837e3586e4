"""Products of what is packed, in torch: with queries, and under weights.

Rows of queries and of weights lie one behind the other in memory, each with its channels or tokens beside each other,
however their axes are named: of a matrix with few columns a product takes three times as long.
"""

from __future__ import annotations

from torch import Tensor


def scored(codes: Tensor, query: Tensor) -> Tensor:
    """Products (..., tokens, rows) of codes (..., tokens, channels) and queries (..., channels, rows)."""
    return (query.mT @ codes.mT).mT


def weighed(codes: Tensor, weights: Tensor) -> Tensor:
    """Sums (..., channels, rows) of codes (..., tokens, channels) under weights (..., tokens, rows)."""
    return (weights.mT @ codes).mT


def unreached(weights: Tensor, tokens: int) -> Tensor:
    """Which blocks of tokens no weight (B, H, tokens, rows) reaches: (B, H, token blocks, 1)."""
    blocks = weights.sum(-1) if tokens == 1 else weights.unflatten(-2, (-1, tokens)).sum((-2, -1))
    return (blocks == 0)[..., None]


def used(numbers: Tensor, weights: Tensor, tokens: int) -> Tensor:
    """Numbers (B, H, token blocks, ...) with those of blocks that no weight reaches made 0: they may be anything."""
    return numbers.masked_fill(unreached(weights, tokens), 0.0)
