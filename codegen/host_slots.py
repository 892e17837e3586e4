"""Single numbers that are kept as they are, in torch: taken out of vectors, and put into slots, for both backends.

Choosing them takes sorting, which Triton has no wide enough form of; it is done when tokens are packed, not when they
are read.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from kvdsl.codes import SLOT_TOKENS, Sparse
from kvdsl.rope import pairs as partners
from kvdsl.scheme import Side

from .host import bits_fp16, finite, saturated, to_int16
from .host_blocks import blocks


class Split(NamedTuple):
    """Vectors (n, H, T, D) without the numbers that are kept, float32, and where these stand, int64 (n, H, T / 64,
    slots, 64 or D): of keys channels of every token, of values tokens of every channel.  Slots not `used` are at 0."""

    filled: Tensor
    places: Tensor
    used: Tensor


def split(x: Tensor, code: Sparse, side: Side, thresholds: Tensor | None) -> Split:
    """Take the largest and smallest numbers of every line, or those beyond thresholds (2, H, D), out of x (n, H, T, D),
    whole blocks; a NaN stays."""
    clean = finite(x.to(torch.float32))
    extreme, fill = _sorted(clean, code) if thresholds is None else _beyond(clean, code, thresholds)
    far = torch.where(extreme & ~torch.isnan(x), (clean - fill).abs(), -1.0)
    found = slotted(far, side).sort(dim=-2, descending=True, stable=True)
    used = found.values[..., : code.slots, :] >= 0
    places = torch.where(used, found.indices[..., : code.slots, :], 0)
    taken = torch.zeros_like(found.indices).scatter_add_(-2, places, used.to(torch.int64))
    filled = torch.where(_unslotted(taken, side) > 0, fill, saturated(x.to(torch.float32)))
    return Split(filled.contiguous(), places, used)  # kernels take rows; sorting keeps the strides of its lines


def _sorted(x: Tensor, code: Sparse) -> tuple[Tensor, Tensor]:
    """Which numbers of x are the largest and smallest of their lines, and what stands in for each."""
    lines = _lines(x, code)
    count, number = lines.shape[-1], code.taken(lines.shape[-1])
    rising, order = lines.sort(dim=-1, stable=True)
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(count, device=x.device).expand_as(order))
    low, high = rank < number, rank >= count - number
    if code.fill == "mean":
        fill = (lines.to(torch.float64).sum(-1, keepdim=True) / count).to(torch.float32).expand_as(lines)
    elif code.fill == "clamp":
        fill = torch.where(low, rising[..., number, None], rising[..., count - number - 1, None])
    else:
        fill = torch.zeros_like(lines)
    return _back(low | high, x, code), _back(fill, x, code)


def _beyond(x: Tensor, code: Sparse, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """Which numbers of x are beyond the thresholds of their channel, and what stands in for each."""
    low, high = thresholds[:, :, None]
    if code.fill == "mean":
        fill = ((low.to(torch.float64) + high) / 2).to(torch.float32).expand_as(x)
    else:
        fill = torch.zeros_like(x) if code.fill == "zero" else torch.where(x < low, low, high)
    return (x < low) | (x > high), fill


def kept(rest: Tensor, taken: Split, side: Side) -> Tensor:
    """What is kept of `rest` (n, H, T, D) in the slots, as bits of float16, int16: 0 where they are not used."""
    words = bits_fp16(saturated(slotted(rest, side).gather(-2, taken.places)))
    return to_int16(torch.where(taken.used, words, 0))


def by_channel(query: Tensor, heads: int) -> Tensor:
    """A query (B, Hq, Q, D) as the numbers of all rows of every channel of a kv head, float32 (B, H, D, Q * group)."""
    rows = query.unflatten(1, (heads, -1)).permute(0, 1, 4, 3, 2)
    # one kernel, where .to() and .contiguous() are two
    return torch.empty(rows.shape, dtype=torch.float32, device=query.device).copy_(rows).flatten(3)


def by_turned_channel(query: Tensor, heads: int, pairs: int, interleaved: bool) -> Tensor:
    """The same, and behind the numbers of every channel those of the query a quarter turn on, q'' = (q[b], -q[a]) of
    each rotated pair (a, b), else 0: float32 (B, H, D, 2 * Q * group)."""
    partner, sign = _quarter(query.shape[3], 2 * pairs, interleaved, query.device)
    turned = query[..., partner].to(torch.float32) * sign
    return torch.cat((by_channel(query, heads), by_channel(turned, heads)), -1)


@lru_cache(maxsize=64)
def _quarter(channels: int, rotated: int, interleaved: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """(the partner of every channel, the sign that it has in q''): copied to the device once, not in every step."""
    _, partner, first = partners(channels, rotated, interleaved)
    sign = torch.where(torch.arange(channels) < rotated, torch.where(first, 1.0, -1.0), 0.0)
    return partner.to(device), sign.to(device)


def in_places(numbers: Tensor, places: Tensor, length: int) -> Tensor:
    """Numbers (..., slots, W) in their places among `length`, 0 elsewhere: float32 (..., length, W)."""
    whole = torch.zeros(*numbers.shape[:-2], length, numbers.shape[-1], device=numbers.device)
    there = places.to(torch.int64).clamp(max=length - 1)  # of a page that was never written they are any
    return whole.scatter_add_(-2, there, numbers.to(torch.float32))


def slotted(x: Tensor, side: Side) -> Tensor:
    """x (n, H, T, D) as (n, H, T / 64, numbers that share slots, 64 tokens or D channels)."""
    rows = x.unflatten(2, (-1, SLOT_TOKENS))
    return rows.mT if side == "keys" else rows


def _unslotted(rows: Tensor, side: Side) -> Tensor:
    """The inverse of `slotted`."""
    return (rows.mT if side == "keys" else rows).flatten(2, 3)


def _sizes(x: Tensor, code: Sparse) -> tuple[int, int, int]:
    """(tokens, channels, heads) of a line of x (n, H, T, D)."""
    line, (_, heads, tokens, channels) = code.line, x.shape
    return (
        line.tokens if isinstance(line.tokens, int) else tokens,
        line.channels if isinstance(line.channels, int) else channels,
        line.heads if isinstance(line.heads, int) else heads,
    )


def _lines(x: Tensor, code: Sparse) -> Tensor:
    """x (n, H, T, D) as lines (n, H / heads, T / tokens, D / channels, numbers)."""
    return blocks(x, _sizes(x, code)).permute(0, 1, 3, 5, 2, 4, 6).flatten(4)


def _back(lines: Tensor, x: Tensor, code: Sparse) -> Tensor:
    """The inverse of `_lines`."""
    tokens, channels, heads = _sizes(x, code)
    return lines.unflatten(-1, (heads, tokens, channels)).permute(0, 1, 4, 2, 5, 3, 6).reshape(x.shape)
