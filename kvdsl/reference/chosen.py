"""Outlier channels that are chosen anew: which ones they are, and what is kept of them.

QJL (arXiv 2406.03482, section 4): the largest channels of every few tokens are sketched apart from the others.  Kitty
(arXiv 2511.18643, section 3): they are coded with more bits, whose lowest ones stand among the codes of all channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvdsl.codes import Chosen
from kvdsl.scheme import TopChannels

from .rounding import LARGEST_INPUT


def choose(x: Tensor, choice: TopChannels) -> Tensor:
    """The largest channels of every head and `per` tokens of x (B, H, T, D), rising: int64 (B, H, T / per, n).

    A NaN is no size; of channels of one size the lower ones come first.
    """
    size = x.nan_to_num(0.0).abs().clamp(max=LARGEST_INPUT).unflatten(2, (-1, choice.tokens)).double()
    if choice.by == "absmax":
        size = size.amax(3)
    else:
        size = size.mean(3) if choice.by == "absmean" else size.square().sum(3)
    order = size.argsort(dim=-1, descending=True, stable=True)
    return order[..., : choice.count(x.shape[3])].sort(-1).values


def among(channels: Tensor, choice: TopChannels, head_dim: int) -> Tensor:
    """Whether each number is of a chosen channel: bool (B, H, T, D)."""
    found = torch.zeros(*channels.shape[:3], head_dim, dtype=torch.bool).scatter(-1, channels, True)
    return found.repeat_interleave(choice.tokens, 2)


def gathered(x: Tensor, channels: Tensor, choice: TopChannels) -> Tensor:
    """x (B, H, T, D) at the chosen channels: (B, H, T, n)."""
    return x.gather(-1, channels.repeat_interleave(choice.tokens, 2))


def put_back(numbers: Tensor, channels: Tensor, choice: TopChannels, head_dim: int) -> Tensor:
    """Numbers (B, H, T, n) of the chosen channels, 0 elsewhere: (B, H, T, D)."""
    whole = torch.zeros(*numbers.shape[:3], head_dim, dtype=numbers.dtype)
    return whole.scatter(-1, channels.repeat_interleave(choice.tokens, 2), numbers)


def kept_of(rest: Tensor, channels: Tensor, code: Chosen) -> Tensor:
    """What is kept of `rest` (B, H, T, D) at the chosen channels, float64 holding float16 numbers: (B, H, T, n)."""
    numbers = gathered(rest, channels, code.choice)
    return numbers.clamp(-LARGEST_INPUT, LARGEST_INPUT).to(torch.float16).to(torch.float64) + 0.0
