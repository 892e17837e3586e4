"""Tables of vectors from typical numbers: weighted k-means, for every kv head and group of channels by itself.

Centres are first drawn from the vectors, each with a probability in proportion to its weight times its squared distance
to the nearest centre before it (k-means++, Arthur and Vassilvitskii, SODA 2007), from a fixed seed; then each is moved
to the mean of what is nearest to it, round by round (Lloyd, IEEE Trans. Inf. Theory 28, 1982).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .codes import Vectors
from .measuring import LARGEST

SEED = 0
ROUNDS = 100  # at most: most tables stand still before
MOST_VECTORS = 1 << 14  # that a table is fitted to; of more evenly spaced ones are taken
TOGETHER = 1 << 24  # distances that are in memory at a time


def vectors(code: Vectors, x: Tensor, gradient: Tensor | None = None) -> Tensor:
    """The tables of x (B, H, T, D): float32 (H, groups, 2**bits, channels), each a number of float16.

    `gradient`: the loss's by x, of the same shape, where squared distances are weighed by it."""
    rows = _grouped(x.double().nan_to_num(0.0).clamp(-LARGEST, LARGEST), code)
    mass = torch.ones_like(rows[..., 0])
    if gradient is not None:
        mass = _grouped(gradient.double(), code).square().sum(-1)
    generator = torch.Generator().manual_seed(SEED)
    tables = [clustered(one, weight, 2**code.bits, generator) for one, weight in zip(rows, mass, strict=True)]
    found = torch.stack(tables).unflatten(0, (x.shape[1], -1))
    return found.clamp(-LARGEST, LARGEST).to(torch.float16).to(torch.float32)


def _grouped(x: Tensor, code: Vectors) -> Tensor:
    """x (B, H, T, D) by heads and groups of channels: (H * groups, vectors, channels), on the CPU."""
    rows = x.cpu().transpose(0, 1).flatten(1, 2)
    step = -(-rows.shape[1] // MOST_VECTORS)
    return rows[:, ::step].unflatten(-1, (-1, code.channels)).transpose(1, 2).flatten(0, 1)


def clustered(rows: Tensor, mass: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` centres of rows (vectors, channels) with weights `mass`, float64, in the order in which they were drawn.
    Where there are fewer different vectors than that, some centres are equal."""
    kept = mass > 0
    rows, mass = (rows[kept], mass[kept] / mass.sum()) if bool(kept.any()) else (rows, torch.ones_like(mass))
    centres = _drawn(rows, mass, count, generator)
    for _ in range(ROUNDS):
        nearest = _nearest(rows, centres)
        masses = torch.zeros(count, dtype=rows.dtype).index_add(0, nearest, mass)
        sums = torch.zeros_like(centres).index_add(0, nearest, mass[:, None] * rows)
        moved = torch.where(masses[:, None] > 0, sums / masses.clamp(min=2.0**-900)[:, None], centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres


def _drawn(rows: Tensor, mass: Tensor, count: int, generator: torch.Generator) -> Tensor:
    centres, far = list[Tensor](), torch.ones_like(mass)
    for _ in range(count):
        chance = (mass * far).cumsum(0)
        place = torch.rand(1, dtype=torch.float64, generator=generator) * chance[-1]
        index = int(torch.searchsorted(chance, place, right=True).clamp(max=len(rows) - 1))
        centres.append(rows[index])
        apart = (rows - centres[-1]).square().sum(-1)
        far = apart if len(centres) == 1 else torch.minimum(far, apart)
    return torch.stack(centres)


def _nearest(rows: Tensor, centres: Tensor) -> Tensor:
    """Of every row the first of the nearest centres."""
    step = max(1, TOGETHER // len(centres))
    norms = centres.square().sum(-1) / 2
    return torch.cat([(norms - part @ centres.mT).argmin(-1) for part in rows.split(step)])
