"""Rotary pairs of keys whose positions were taken off, as bounds and products need them."""

from __future__ import annotations

import torch
from torch import Tensor

from kvdsl.kernels import Params
from kvdsl.rope import pairs, waves
from kvdsl.scheme import Store


def partners(store: Store, x: Tensor, params: Params) -> Tensor:
    """Of each channel of x (..., D) the other of its rotary pair; 0 where it is not rotated."""
    assert store.rope is not None
    rotated = 2 * len(params["keys.transform[0]"])
    _, partner, _ = pairs(x.shape[-1], rotated, store.rope.interleaved)
    return torch.where(torch.arange(x.shape[-1]) < rotated, x[..., partner], 0.0)


def spread_waves(store: Store, params: Params, at: int, tokens: int, channels: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each channel at positions from `at` on, (tokens, D); 1 and 0 where it is not rotated."""
    assert store.rope is not None
    frequencies = params["keys.transform[0]"].cpu()
    pair, _, _ = pairs(channels, 2 * len(frequencies), store.rope.interleaved)
    rest = channels // 2 - len(frequencies)
    cos, sin = waves(frequencies, at, at + tokens)
    pad = torch.nn.functional.pad
    return pad(cos, (0, rest), value=1.0)[:, pair], pad(sin, (0, rest))[:, pair]
