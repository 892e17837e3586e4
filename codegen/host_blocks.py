"""Blocks of numbers that share a scale, in generated torch modules: what is measured of them, and spread over them."""

from __future__ import annotations

import torch
from torch import Tensor

from .host import finite

Block = tuple[int, int, int]
OVER_BLOCK = (2, 4, 6)


def blocks(x: Tensor, block: Block) -> Tensor:
    """x (n, H, T, D) in blocks of (tokens, channels, heads): (n, H/heads, heads, T/tokens, tokens, D/channels,
    channels)."""
    (n, h, t, d), (tokens, channels, heads) = x.shape, block
    return x.reshape(n, h // heads, heads, t // tokens, tokens, d // channels, channels)


def range_of(x: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """The lowest and the highest of the finite numbers of every block: (n, H/heads, T/tokens, D/channels) each."""
    numbers = blocks(x, block)
    return numbers.amin(OVER_BLOCK), numbers.amax(OVER_BLOCK)


def top_of(x: Tensor, block: Block) -> Tensor:
    """The size of the largest of the finite numbers of every block."""
    return blocks(x.abs(), block).amax(OVER_BLOCK)


def size_at(x: Tensor, block: Block, place: int) -> Tensor:
    """The size at a place of the finite numbers of every block, the smallest first."""
    numbers = blocks(x.abs(), block).permute(0, 1, 3, 5, 2, 4, 6).flatten(4)
    return numbers.kthvalue(place + 1, -1).values


def nan_in(x: Tensor, block: Block) -> Tensor:
    """Whether a block holds a NaN."""
    return torch.isnan(blocks(x, block).amax(OVER_BLOCK))


def summed(x: Tensor, block: Block) -> Tensor:
    """The sum of every block."""
    return blocks(x, block).sum(OVER_BLOCK)


def nan(x: Tensor) -> Tensor:
    """Whether x is not a number."""
    return torch.isnan(x)


def square(x: Tensor) -> Tensor:
    """Squares of numbers made finite, float64."""
    return finite(x).to(torch.float64) ** 2


def magnitude(x: Tensor) -> Tensor:
    """Sizes of numbers made finite, float64."""
    return finite(x).to(torch.float64).abs()


def spread(numbers: Tensor, tokens: int, channels: int, heads: int) -> Tensor:
    """A number of every block at each of its places: the shape that `blocks` took, up to expansion."""
    for dim, count in ((1, heads), (2, tokens), (3, channels)):
        if count > 1 and (numbers.shape[dim] > 1 or dim == 2):
            numbers = numbers.repeat_interleave(count, dim)
    return numbers
