"""Tiles brought to like rows and columns when tokens are packed, in torch, for both backends: every round folds all
numbers of a tile, twice along either axis, which is done once for each token and not where tokens are read."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvdsl.scheme import Balance

from .host import LARGEST, finite
from .plan import SidePlan

LEAST, MOST = 1e-3, 1e3
EVENER = 1 - 2**-20  # a round that evens out no more than this is none: else rounding would choose among equals
AT_ONCE = 1 << 22  # numbers in float64


def balanced(side: SidePlan, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (n, H, T, D) of whole tiles over their factors, float32, and the factors' bytes: uint8 (n, H, T / tokens,
    2 * tokens or 2 * D)."""
    part = side.store.balance
    assert part is not None
    tiles = rows.to(torch.float32).unflatten(2, (-1, part.tokens))
    flat = tiles.flatten(0, 2)
    size = max(1, AT_ONCE // flat[0].numel())
    found = [_factors(some, part, -1 if side.store.of_tokens else -2) for some in flat.split(size)]
    kept = torch.cat(found).unflatten(0, tiles.shape[:3]) if found else tiles.narrow(-1, 0, 1).half()
    each = kept.to(torch.float32)
    even = torch.where(each == 0, torch.zeros_like(tiles), tiles / torch.where(each == 0, 1.0, each))
    return even.flatten(2, 3).contiguous(), kept.contiguous().view(torch.uint8).flatten(-2)


def _factors(tiles: Tensor, part: Balance, over: int) -> Tensor:
    """The stored factors of tiles (n, T, D), deviations over an axis, float16, that axis 1 long."""
    tiles = finite(tiles).to(torch.float64)
    across = -3 - over
    unit = torch.ones_like(tiles[:, :1, :1])
    if part.unit == "rms":
        size = tiles.square().mean((-2, -1), keepdim=True).sqrt()
        unit = torch.where(size > 0, size, unit)
        tiles = tiles / unit
    low, high = math.exp(part.low), math.exp(part.high)
    kept, other = torch.ones_like(tiles.narrow(over, 0, 1)), torch.ones_like(tiles.narrow(across, 0, 1))
    best, least = kept, torch.full_like(unit, torch.inf)
    for _ in range(part.loops):
        kept = (kept * _deviation(tiles / (kept * other), over)).clamp(low, high)
        other = (other * _deviation(tiles / (kept * other), across)).clamp(low, high)
        even = tiles / (kept * other)
        uneven = _spread(_deviation(even, over)) + _spread(_deviation(even, across))
        better = uneven < least * EVENER
        best, least = torch.where(better, kept, best), torch.where(better, uneven, least)
    return (best * unit).to(torch.float32).clamp(-LARGEST, LARGEST).to(torch.float16)


def _deviation(x: Tensor, axis: int) -> Tensor:
    return x.std(axis, correction=1, keepdim=True).clamp(LEAST, MOST)


def _spread(x: Tensor) -> Tensor:
    return x.amax((-2, -1), keepdim=True) / x.amin((-2, -1), keepdim=True)
