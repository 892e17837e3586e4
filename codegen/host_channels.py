"""Outlier channels that are chosen anew, in torch: which ones they are, and their bytes, for both backends.

Choosing them takes sorting and is done when tokens are packed, not when they are read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvdsl.scheme import Parted, TopChannels

from .host import finite
from .host_beside import met_at
from .side import SidePlan


def choose(x: Tensor, choice: TopChannels) -> Tensor:
    """The largest channels of every head and `per` tokens of x (n, H, T, D), rising: int64 (n, H, T / per, count)."""
    size = finite(x.to(torch.float32)).abs().to(torch.float64).unflatten(2, (-1, choice.tokens))
    if choice.by == "absmax":
        size = size.amax(3)
    else:
        size = size.mean(3) if choice.by == "absmean" else size.square().sum(3)
    order = size.sort(dim=-1, descending=True, stable=True).indices
    return order[..., : choice.count(x.shape[3])].sort(-1).values


def among(channels: Tensor, tokens: int, head_dim: int) -> Tensor:
    """Whether numbers of D channels are of chosen ones, (n, H, blocks, count) of `tokens` tokens each: (n, H, T, D)."""
    found = torch.zeros(*channels.shape[:3], head_dim, dtype=torch.bool, device=channels.device)
    there = channels.to(torch.int64).clamp(max=head_dim - 1)  # of a page that was never written they are any
    return found.scatter(-1, there, True).repeat_interleave(tokens, 2)


def given(store: Parted, rest: Tensor, theirs: Tensor) -> Tensor:
    """What a store is given of vectors (n, H, T, D) where it stands beside that of chosen channels, `theirs`, or is
    that one."""
    if store.masked:
        return torch.where(theirs == store.top, rest, 0.0)
    return rest if store.raised else torch.where(theirs, 0.0, rest)


def queries(query: Tensor, decode: Tensor, channels: Tensor, *, top: bool) -> Tensor:
    """What codes of every block meet: query (B, H, D, rows) by the map (H or 1, D, M) of the chosen channels, (B, H,
    blocks, count), or of the others: (B, H, blocks, M, rows)."""
    there = channels.to(torch.int64).clamp(max=query.shape[2] - 1)
    heads = torch.arange(query.shape[1], device=query.device)[:, None, None]
    theirs = decode.expand(query.shape[1], -1, -1)[heads, there].mT @ met_at(query, channels)
    return theirs if top else (decode.mT @ query)[:, :, None] - theirs


def ready_rows(side: SidePlan, matrix: Tensor, sums: int) -> Tensor:
    """A map (heads or 1, D, M) of single channels to coded numbers, as queries whose surplus of lower bits in a word is
    taken off, and behind them `sums` numbers a channel, the first of which is the sum of its row: float32 (heads or 1,
    D * M + D * sums)."""
    from .algebra import query_of_dirty

    width, (stream,) = side.layout.plane_width, side.operands
    planes = matrix.to(torch.float32).split(width, -1)
    found = []
    for place in stream.places:
        position = place.bit // stream.width
        steps = query_of_dirty(stream.width, position, side.run(stream, place.plane))
        found.append(sum(planes[place.plane + step - position] * float(factor) for step, factor in steps))
    last = matrix.new_zeros(*matrix.shape[:2], sums, dtype=torch.float32)
    last[..., 0] = matrix.to(torch.float32).sum(-1)
    return torch.cat((torch.cat(found, -1).flatten(1), last.flatten(1)), -1)
