"""Rotary pairs of keys whose positions were taken off, as bounds and products need them."""

from __future__ import annotations

import torch
from torch import Tensor

from kvdsl.kernels import Backend, Params
from kvdsl.rope import pairs, waves
from kvdsl.scheme import Store


def roundings(store: Store, backend: Backend) -> int:
    """Of a product with a key of this store how many numbers may be rounded to float16: the query's and the key's.  Of
    keys that the Triton kernels put to their positions in float16 level, number, cosine, product and sum: those of
    which positions are all that was taken off, of halves that are pairs."""
    turned = store.rope is not None and not store.rope.interleaved and len(store.transform) == 1  # type: ignore[arg-type]
    return 6 if turned and backend == "triton" else 2


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
