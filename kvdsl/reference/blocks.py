"""Blocks of tokens x channels x heads of a tensor: those that share a scale, and lines that are compared."""

from __future__ import annotations

import torch
from torch import Tensor

from kvdsl.errors import ShapeError
from kvdsl.scheme import Block, Count


def block_size(block: Block, shape: torch.Size | tuple[int, ...], side: str) -> tuple[int, int, int]:
    """(heads, tokens, channels) of a block of a tensor of `shape`; ShapeError where blocks do not fill an axis."""
    _, heads, tokens, channels = shape
    size = (_count(block.heads, heads), _count(block.tokens, tokens), _count(block.channels, channels))
    for axis, count, length in zip(("heads", "tokens", "channels"), size, (heads, tokens, channels), strict=True):
        if length % count:
            fact = f"{side}: shape {tuple(shape)} has {length} {axis}, no whole number of blocks of {count}"
            raise ShapeError(f"{fact}; give a multiple of {count}")
    return size


def _count(count: Count, length: int) -> int:
    return count if isinstance(count, int) else max(length, 1)


def cut(x: Tensor, size: tuple[int, int, int]) -> Tensor:
    """(B, H, T, D) as (B, H / heads, T / tokens, D / channels, numbers of a block)."""
    (b, h, t, d), (bh, bt, bc) = x.shape, size
    x = x.reshape(b, h // bh, bh, t // bt, bt, d // bc, bc)
    return x.permute(0, 1, 3, 5, 2, 4, 6).reshape(b, h // bh, t // bt, d // bc, bh * bt * bc)


def join(blocks: Tensor, shape: torch.Size, size: tuple[int, int, int]) -> Tensor:
    """The inverse of `cut`."""
    (b, h, t, d), (bh, bt, bc) = shape, size
    blocks = blocks.reshape(b, h // bh, t // bt, d // bc, bh, bt, bc)
    return blocks.permute(0, 1, 4, 2, 5, 3, 6).reshape(b, h, t, d)
