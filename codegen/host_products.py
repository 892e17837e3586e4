"""Products of what is packed, in torch: with queries, and under weights.

Rows of queries and of weights lie one behind the other in memory, each with its channels or tokens beside each other,
however their axes are named: of a matrix with few columns a product takes three times as long.
"""

from __future__ import annotations

import torch
from torch import Tensor


def scored(codes: Tensor, query: Tensor) -> Tensor:
    """Products (..., tokens, rows) of codes (..., tokens, channels) and queries (..., channels, rows)."""
    return (query.mT @ codes.mT).mT


def weighed(codes: Tensor, weights: Tensor) -> Tensor:
    """Sums (..., channels, rows) of codes (..., tokens, channels) under weights (..., tokens, rows)."""
    return (weights.mT @ codes).mT


def used(numbers: Tensor, weights: Tensor, tokens: int) -> Tensor:
    """Numbers (B, H, token blocks, ...) with those of blocks that no weight reaches made 0: they may be anything."""
    reached = (weights > 0).any(-1).unflatten(-1, (-1, tokens)).any(-1)
    return torch.where(reached[..., None], numbers, 0.0)
