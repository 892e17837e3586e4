"""Codes of vectors in torch: the nearest entry of a table, and the numbers that a code stands for; tables as words."""

from __future__ import annotations

import torch
from torch import Tensor

from .host import finite

TOGETHER = 16  # entries of a table that are compared at a time
WORDS = {4: torch.int32, 8: torch.int64}  # by their bytes


def nearest_vectors(x: Tensor, table: Tensor) -> Tensor:
    """The codes of x (..., H, T, D) in tables (H, groups, entries, channels): whole numbers (..., H, T, groups), of
    several nearest entries the first."""
    count, channels = table.shape[2:]
    numbers = finite(x).unflatten(-1, (-1, channels)).unsqueeze(-2).unbind(-1)
    entries = table.to(torch.float32)[:, None]
    least = code = torch.empty(0)
    for first in range(0, count, TOGETHER):
        far = torch.zeros(())
        for one, other in zip(numbers, entries[..., first : first + TOGETHER, :].unbind(-1), strict=True):
            apart = one - other
            far = far + apart * apart
        nearest, which = far.min(-1)
        closer = nearest < least if first else torch.ones_like(nearest, dtype=torch.bool)
        code = torch.where(closer, which + first, code) if first else which
        least = torch.where(closer, nearest, least) if first else nearest
    return code


def vectors_of(codes: Tensor, table: Tensor) -> Tensor:
    """What codes (B, H, T, groups) stand for in tables (H, groups, entries, channels): float32 (B, H, T, D)."""
    heads, groups, count, _ = table.shape
    first = torch.arange(heads * groups, device=codes.device).reshape(heads, 1, groups) * count
    return table.flatten(0, 2)[codes.to(torch.int64) + first].flatten(-2).to(torch.float32)


def table_words(table: Tensor) -> Tensor:
    """Tables of float16 numbers as words of four of them, or of two; other numbers as they are."""
    return table.view(WORDS[2 * min(4, table.shape[-1])]) if table.dtype == torch.float16 else table
