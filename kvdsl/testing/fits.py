"""How far a number may lie from its original under a second scale, fitted to the codes that a first one gave.

A scale chosen for the least squared error of its block does not do worse, summed, than any other: a scale fitted by
least squares leaves no number off by more than the root of the sum of the squared bounds under the first one; storing
it moves numbers by dev of it times a level, at most u*|x|_2 + e*top.  A scale fitted otherwise is bounded by its own
formula: norms agree, so |x^| <= |x|_2 at most; weighted by x^2 the scale times the least level is at most the largest
size A, and codes are the nearest to it.  Of unit gain, with x^ under the first scale and |x - x^| <= r |x|, it is
<x,x>/<x,x^> times as large, within 1/(1 +- r); where r is no less than 1, or squares are below what float32 holds, it
may be anything that its format has.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvdsl.scheme import Scale

from .formats import FORMATS, OVER_BLOCK, SLACK


def fitted(scale: Scale, limit: Tensor, numbers: Tensor, top: float, outer: Tensor | float) -> Tensor:
    """The bound under the second scale, `limit` being that under the first one, both float64 and as numbers (B, H/bh,
    bh, T/bt, bt, D/bc, bc); `top` is the largest size of a level, `outer` the second level."""
    unit, least, most = FORMATS[scale.dtype]
    length = numbers.square().sum(OVER_BLOCK, keepdim=True).sqrt()
    moved = unit * length + least * top * outer
    within = limit.expand_as(numbers).square().sum(OVER_BLOCK, keepdim=True).sqrt()
    if scale.refit == "unit_gain":
        share = within / length.clamp(min=1e-300)
        known = (share < 0.999) & (length.square() > 2.0**-120)
        grown = share / (1 - share.clamp(max=0.999)) + SLACK
        near = limit + (grown + 2 * unit * (1 + grown)) * (numbers.abs() + limit) + 2 * moved
        return torch.where(known, near, numbers.abs() + limit + most * top * outer)
    if scale.refit == "least_squares":
        most_of = within
    elif scale.refit == "norm":
        most_of = numbers.abs() + length
    else:
        most_of = numbers.abs() + numbers.abs().amax(OVER_BLOCK, keepdim=True)
    return (most_of * (1 + SLACK) + 2 * moved).expand_as(numbers) + limit  # the first one stays where sums say nothing
