"""Partial outputs of attention as one: weighted by their log-sum-exps, whatever the order and the number of parts."""

from __future__ import annotations

import torch
from torch import Tensor


def merged(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs (parts, ..., D) and log-sum-exps (parts, ...), float32 -> (out (..., D), lse (...)).

    A part that sees no token has -inf and counts nothing; where no part sees any, zeros and -inf.  No weight is above
    1, so nothing overflows.
    """
    whole = torch.logsumexp(lse, 0)
    weights = torch.exp(lse - torch.where(whole == -torch.inf, 0.0, whole))
    return (out * weights[..., None]).sum(0), whole
