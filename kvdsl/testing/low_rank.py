"""Vectors of low rank: what they do to bounds and blocks, and the law that what is read of them is a projection."""

from __future__ import annotations

import torch
from torch import Tensor

from kvdsl.codes import LowRank
from kvdsl.reference.quantize import Quantized
from kvdsl.scheme import SIDES, Scheme, Side

from .cases import Case, law, require_within
from .terms import TermOf, terms_of
from .trips import roundtrip

LARGEST = 65504.0
LEAST = 2.0**-14  # of the normal numbers of float16
HALF = 2.0**-9
"""Of the length of a block: rounding of both factors to float16, 2^-11 of each, of sums, and of their squares."""


def blocks(x: Tensor, code: LowRank) -> Tensor:
    """Numbers (B, H, T, D) as rows of blocks (B, H, blocks, tokens, D)."""
    return x.unflatten(2, (-1, code.tokens))


def everywhere(found: Tensor, code: LowRank) -> Tensor:
    """One number a block (B, H, blocks) at each of its places but the channel: (B, H, T, 1)."""
    return found.repeat_interleave(code.tokens, 2)[..., None]


def any_in_block(holds: Tensor, code: LowRank) -> Tensor:
    """Whether something holds of any number of the block of each of (B, H, T, D)."""
    return everywhere(blocks(holds, code).any(-1).any(-1), code).expand(holds.shape)


def bound(x: Tensor, code: LowRank) -> Tensor:
    """The largest legal |x - x^|: the length of the block, which a projection does not exceed, and what rounding adds:
    2^-10 of products of numbers and vectors, which are no longer than the block, and half the smallest float16 number
    times the largest vector, or the largest number of a token."""
    inside = x.double().clamp(-LARGEST, LARGEST)
    length = blocks(inside, code).square().sum((3, 4)).sqrt()
    largest = blocks(inside.abs(), code).amax((3, 4)) + code.factor
    limit = everywhere(length * (1 + HALF) + code.rank * 2.0**-24 * largest, code)
    return limit + (x.double() - inside).abs()


def sizes(kept: Quantized) -> Tensor:
    """What a number counts in errors of products: a query meets the vectors, is rounded in units of the largest of what
    that gives, and meets the numbers of a token: sum_j |a[t, j]| max_j |b[j, d]|."""
    assert kept.factors is not None
    a, b = kept.factors
    tokens = a.shape[2] // b.shape[2]
    return a.abs().sum(-1, keepdim=True) * b.abs().amax(3).repeat_interleave(tokens, 2)


def usual(one: TermOf, more: TermOf, code: LowRank, factor: float) -> Tensor:
    """Where all that is stored of a block, of x and of x times a factor, is neither subnormal nor saturated."""
    assert one.kept.factors is not None and more.kept.factors is not None
    (_, b), (_, grown) = one.kept.factors, more.kept.factors
    normal = ((b.abs() > LEAST) | (b == 0) & (grown == 0)) & (b.abs() * factor < LARGEST)
    within = blocks(one.x.double().abs() * factor < LARGEST, code).all(-1).all(-1)
    return everywhere(normal.all(-1).all(-1) & within, code).expand(one.x.shape)


def _last(scheme: Scheme, side: Side) -> bool:
    """Whether nothing comes behind the vectors of low rank."""
    return isinstance(scheme.side(side).placed("")[-1][1].code, LowRank)


@law("P20", lambda s: any(_last(s, side) for side in SIDES), ("normal", "outlier_channel", "constant"))
def low_rank_is_a_projection(case: Case) -> None:
    """P20: what is left behind vectors of low rank is, in the Frobenius norm of every block, no longer than what they
    were given, and no shorter than the best ones of that rank leave (Eckart and Young), but for rounding."""
    k, v = case.pair(case.whole)
    params = case.params(k, v)
    for side, x, got in zip(SIDES, (k, v), roundtrip(case, k, v, params), strict=True):
        if not _last(case.scheme, side):
            continue
        *_, term = terms_of(case.scheme.side(side), x, params, side, case.sinks)
        code = term.store.code
        assert isinstance(code, LowRank)
        given = blocks(term.x.double(), code)
        left = blocks(x.double() - got.double(), code).square().sum((3, 4)).sqrt()
        values = torch.linalg.svdvals(given)
        whole = values.square().sum(-1).sqrt()
        least = values[..., code.rank :].square().sum(-1).sqrt()
        # what is decoded is rounded to float32 once more, and the smallest numbers of float16 are coarse
        count = code.tokens * x.shape[3]
        rounded = 2.0**-22 * blocks(x.double(), code).square().sum((3, 4)).sqrt()
        rounded = rounded + code.rank * 2.0**-24 * (given.abs().amax((3, 4)) + code.factor) * count**0.5
        middle, reach = (whole + least) / 2, (whole - least) / 2
        require_within(f"length of what is left of {side}", left, middle, reach + HALF * whole + rounded)
