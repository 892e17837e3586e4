"""Maps that vectors go through before they are coded and behind it, as vectorised torch, for both backends."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvdsl.spaces import applied

from .host import finite


def mapped(x: Tensor, matrix: Tensor, shift: Tensor | None) -> Tensor:
    """float32 (n, H, T, in) by a map (H or 1, out, G in) and a shift (H or 1, out), summed in float64, rounded once."""
    y = applied(matrix.to(torch.float64), x.to(torch.float64))
    return (y if shift is None else y + shift[:, None].to(torch.float64)).to(torch.float32)


def rotated(x: Tensor, waves: tuple[Tensor, Tensor], interleaved: bool) -> Tensor:
    """Rotary positions put on x (n, H, T, D) by cosines and sines, each (n or 1, 1, T, R/2), in their dtype; minus the
    sines takes them off.  Of the D channels the first R are rotated."""
    cos, sin = waves
    count = 2 * cos.shape[-1]
    one, two = (0, 1) if interleaved else (0, cos.shape[-1])
    step, stop = (2, count) if interleaved else (1, count // 2)
    a, b = (x[..., first : first + stop : step].to(cos.dtype) for first in (one, two))
    turned = a * cos - b * sin, b * cos + a * sin
    both = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat((both.to(x.dtype), x[..., count:]), -1)


def polar(x: Tensor, levels: int = 1) -> Tensor:
    """float32 (..., D) as the D/2 radii, then the angles in [0, 2 pi], of channels i and i + D/2; of more levels the
    radii are paired again, i and i + D/4, ...: those that are left, then the angles of the first level, the second, ...

    Each is taken in float64 and rounded once.  A NaN spoils its vector."""
    spoilt = torch.isnan(x).any(-1, keepdim=True)
    radius, angles = (finite(x) + 0.0).to(torch.float64), []  # a zero without sign
    for _ in range(levels):
        a, b = radius.chunk(2, -1)
        angle = torch.atan2(b, a)
        angles.append(torch.where(angle < 0, angle + 2 * math.pi, angle))
        radius = torch.sqrt(a * a + b * b)
    y = torch.cat((radius, *angles), -1).to(torch.float32)
    return torch.where(spoilt, torch.nan, y)


def cartesian(y: Tensor, levels: int = 1) -> Tensor:
    """The inverse of `polar`: r cos a, then r sin a, from the last level to the first."""
    sizes = [y.shape[-1] >> level + 1 for level in range(levels)]
    radius, *angles = y.to(torch.float64).split([sizes[-1], *sizes], -1)
    for a in reversed(angles):
        radius = torch.cat((radius * torch.cos(a), radius * torch.sin(a)), -1)
    return radius.to(torch.float32)


def sign_words(matrix: Tensor, size: int, heads: int) -> Tensor:
    """The random signs of a rotation in blocks of `size` (H or 1, D, D), a bit a channel that is set where it is
    negative: (heads, D / 32) int32."""
    channel = torch.arange(matrix.shape[-1], device=matrix.device)
    negative = matrix[:, channel // size * size, channel] < 0  # of each block the row that has the signs alone
    bits = negative.unflatten(-1, (-1, 32)).to(torch.int64) << torch.arange(32, device=matrix.device)
    return bits.sum(-1).to(torch.int32).expand(heads, -1).contiguous()
