"""Tiles of tokens brought to like rows and columns, as `Balance` says: the factors that are stored."""

from __future__ import annotations

import torch
from torch import Tensor

from kvdsl.transforms import Balance

from .rounding import LARGEST_INPUT, f32, ratio, stored

LEAST, MOST = 1e-3, 1e3  # of one deviation
GAIN = 2**-20  # the relative gain that makes a round better than those before it, of which many can be equal


def balancing(y: Tensor, part: Balance, *, of_tokens: bool) -> Tensor:
    """The stored factors of y (B, H, T, D), whole tiles: fp16 numbers (B, H, T) of tokens, or (B, H, tiles, D) of the
    channels of every tile.  NaN counts as 0."""
    clean = torch.where(y.isnan(), torch.zeros_like(y), y).clamp(-LARGEST_INPUT, LARGEST_INPUT)
    tile = clean.unflatten(2, (-1, part.tokens))
    unit = torch.ones_like(tile[..., :1, :1])
    if part.unit == "rms":
        size = tile.square().mean((-2, -1), keepdim=True).sqrt()
        unit = torch.where(size > 0, size, unit)
    tile = tile / unit
    low, high = (torch.tensor(bound, dtype=torch.float64).exp() for bound in (part.low, part.high))
    over, across = (-1, -2) if of_tokens else (-2, -1)  # what the stored factors are deviations over, and the others
    kept, other = tile.narrow(over, 0, 1) * 0 + 1, tile.narrow(across, 0, 1) * 0 + 1
    best, least = kept, torch.full_like(unit, torch.inf)
    for _ in range(part.loops):
        kept = (kept * _deviation(tile / (kept * other), over)).clamp(low, high)
        other = (other * _deviation(tile / (kept * other), across)).clamp(low, high)
        even = tile / (kept * other)
        uneven = _spread(_deviation(even, over)) + _spread(_deviation(even, across))
        better = uneven < least * (1 - GAIN)
        best, least = torch.where(better, kept, best), torch.where(better, uneven, least)
    kept = best * unit
    return stored(f32(kept), "fp16").squeeze(-1).flatten(2) if of_tokens else stored(f32(kept), "fp16").squeeze(-2)


def spread(factors: Tensor, part: Balance, *, of_tokens: bool) -> Tensor:
    """The factor of every number, to broadcast over (B, H, T, D)."""
    return factors[..., None] if of_tokens else factors.repeat_interleave(part.tokens, 2)


def divided(y: Tensor, each: Tensor) -> Tensor:
    """y (B, H, T, D) over the factors, float32; 0 where one is stored as 0."""
    return ratio(y, each.expand_as(y))


def _deviation(x: Tensor, axis: int) -> Tensor:
    """The sample deviation along an axis, within bounds."""
    return x.std(axis, correction=1, keepdim=True).clamp(LEAST, MOST)


def _spread(x: Tensor) -> Tensor:
    """The largest deviation of a tile over the smallest."""
    return x.amax((-2, -1), keepdim=True) / x.amin((-2, -1), keepdim=True)
