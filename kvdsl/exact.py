"""Attention in float64 over what a cache holds, piece by piece, so that a long one needs no memory of its own size."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class Tokens(NamedTuple):
    """Some tokens of one sequence: keys and values (H, n, D), and which of them a head has, bool (H, n); None: all."""

    keys: Tensor
    values: Tensor
    there: Tensor | None = None


def attended(query: Tensor, pieces: Iterable[Tokens]) -> Tensor:
    """Attention of one query (Hq, D) over all tokens of all pieces, whatever their order: (Hq, D), float64."""
    heads, channels = query.shape
    query = query.double() * channels**-0.5
    most = torch.full((heads, 1), -torch.inf, dtype=torch.float64, device=query.device)
    total = out = torch.zeros_like(most)  # values say how long an output is
    for keys, values, there in pieces:
        grouped = query.unflatten(0, (keys.shape[0], -1))
        scores = grouped @ keys.double().mT
        if there is not None:
            scores = scores.masked_fill(~there[:, None], -torch.inf)
        now = torch.maximum(most, scores.flatten(0, 1).amax(1, keepdim=True))
        # A head that has no token yet has no largest score: nothing is scaled by it.
        safe = torch.where(now.isinf(), 0.0, now)
        weights = (scores - safe.view(*scores.shape[:2], 1)).exp()
        kept = (most - safe).exp()
        total = total * kept + weights.sum(2).view(-1, 1)
        out = out * kept + (weights @ values.double()).flatten(0, 1)
        most = now
    return out / total


def relative_error(found: Tensor, exact: Tensor) -> float:
    """The norm of the difference over the norm of what is exact."""
    return float((found.double() - exact).norm() / exact.norm())
