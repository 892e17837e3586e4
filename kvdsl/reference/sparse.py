"""Single numbers that are kept as they are: which ones, what stands in for them, and what is kept.

KVQuant (arXiv 2401.18079, section 3.4) and GEAR (arXiv 2403.05527, section 3): of a line the largest and the smallest
numbers are taken out before it is coded, and what is coded there is another number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvdsl.codes import SLOT_TOKENS, Sparse

from .blocks import block_size, cut, join
from .rounding import LARGEST_INPUT, f32, sum64


@dataclass(frozen=True)
class Picked:
    """Which numbers of x (B, H, T, D) are kept as they are.

    taken    bool, as x: the largest and smallest of their lines, or those beyond the thresholds of their channel
    kept     bool, as x: those of them that have a slot
    filled   x with other numbers in the places of `kept`
    places   int64: where those of a line of slots stand in it, the largest deviation first, unused slots at 0; of keys
             (B, H, T, slots) channels, of values (B, H, T / 64, slots, D) tokens of the block
    """

    taken: Tensor
    kept: Tensor
    filled: Tensor
    places: Tensor
    used: Tensor


def pick(x: Tensor, code: Sparse, side: str, thresholds: Tensor | None = None) -> Picked:
    """The picked numbers of x (B, H, T, D), whole blocks of tokens, float64.  A NaN is none of them.

    thresholds   (2, H, D), the lower and the upper one of every channel, where they are calibrated
    """
    clean = x.clamp(-LARGEST_INPUT, LARGEST_INPUT)
    known = clean.nan_to_num(0.0)
    extreme, fill = _sorted(known, code, side) if thresholds is None else beyond(known, code, thresholds)
    taken = extreme & ~x.isnan()
    far = torch.where(taken, f32((known - fill).abs()), -1.0)
    rows, held = (_slot_lines(part, side) for part in (far, taken))
    best = rows.argsort(dim=-1, descending=True, stable=True)[..., : code.slots]
    used = held.gather(-1, best)
    kept = _from_slot_lines(torch.zeros_like(held).scatter(-1, best, used), x.shape, side)
    places = torch.where(used, best, 0)
    if side == "values":
        places, used = places.transpose(-1, -2), used.transpose(-1, -2)
    return Picked(taken, kept, torch.where(kept, fill, clean), places, used)


def _sorted(x: Tensor, code: Sparse, side: str) -> tuple[Tensor, Tensor]:
    """Which numbers of x are the largest and smallest of their lines, and what stands in for each."""
    size = block_size(code.line, x.shape, side)
    lines = cut(x, size)
    count = lines.shape[-1]
    number = code.taken(count)
    order = lines.argsort(dim=-1, stable=True)
    rising = lines.gather(-1, order)
    low = torch.zeros_like(lines, dtype=torch.bool).scatter(-1, order[..., :number], True)
    high = torch.zeros_like(low).scatter(-1, order[..., count - number :], True)
    if code.fill == "mean":
        fill = f32(sum64(lines) / count)[..., None].expand_as(lines)
    elif code.fill == "clamp":
        fill = torch.where(low, rising[..., number, None], rising[..., count - number - 1, None])
    else:
        fill = torch.zeros_like(lines)
    return join(low | high, x.shape, size), join(fill, x.shape, size)


def beyond(x: Tensor, code: Sparse, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """Which numbers of x are beyond the thresholds of their channel, and what stands in for each."""
    low, high = f32(thresholds.detach().cpu())[:, :, None]
    if code.fill == "mean":
        fill = f32((low + high) / 2).expand_as(x)
    else:
        fill = torch.zeros_like(x) if code.fill == "zero" else torch.where(x < low, low, high)
    return (x < low) | (x > high), fill


def kept_numbers(rest: Tensor, picked: Picked, side: str) -> Tensor:
    """What is kept of `rest` (B, H, T, D), float64 holding float16 numbers, as `places`; 0 in unused slots."""
    rows = _slot_lines(rest, side)
    places = picked.places.transpose(-1, -2) if side == "values" else picked.places
    found = rows.gather(-1, places)
    found = found.transpose(-1, -2) if side == "values" else found
    half = found.clamp(-LARGEST_INPUT, LARGEST_INPUT).to(torch.float16).to(torch.float64) + 0.0
    return torch.where(picked.used, half, 0.0)


def placed(numbers: Tensor, picked: Picked, side: str) -> Tensor:
    """The numbers of slots in their places, 0 elsewhere: (B, H, T, D)."""
    shape = picked.kept.shape
    rows = torch.zeros_like(_slot_lines(picked.filled, side))
    if side == "values":
        rows = rows.scatter_add(-1, picked.places.transpose(-1, -2), numbers.transpose(-1, -2))
    else:
        rows = rows.scatter_add(-1, picked.places, numbers)
    return _from_slot_lines(rows, shape, side)


def _slot_lines(x: Tensor, side: str) -> Tensor:
    """What shares slots, last: a token's channels (B, H, T, D), or a channel's tokens (B, H, T / 64, D, 64)."""
    return x.unflatten(2, (-1, SLOT_TOKENS)).transpose(-1, -2) if side == "values" else x


def _from_slot_lines(rows: Tensor, shape: torch.Size, side: str) -> Tensor:
    """The inverse of `_slot_lines`."""
    return rows.transpose(-1, -2).reshape(shape) if side == "values" else rows
