"""Codes whose tables are of vectors: random stores of them, and how far a sum may lie from its vector."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st
from torch import Tensor

from kvdsl.scheme import ALL, Additive, Rotate, Scale, Store, Vectors, per_token

from .formats import OVER_BLOCK, deviation

Draw = Callable[..., Any]
OF_VECTORS = (Additive, Vectors)
ROUNDED = 2.0**-16  # of what is summed: float32 sums of a few hundred vectors


@st.composite
def of_vectors(draw: Draw) -> Store:
    """A store of codes of vectors, or of sums of them."""
    if draw(st.booleans()):
        code = Additive(
            draw(st.integers(1, 4)), stages=draw(st.sampled_from([1, 3, 4, 0.0625])), commuting=draw(st.booleans())
        )
        return Store(code, scale=per_token(heads=draw(st.sampled_from([1, ALL]))))
    vectors = Vectors(draw(st.integers(1, 4)), channels=draw(st.sampled_from([2, 4])))
    return Store(vectors, transform=draw(st.sampled_from([(), Rotate("hadamard", 8)])))


def bound(code: Additive, x: Tensor, table: Tensor, scale: Scale) -> Tensor:
    """The largest legal |x - x^|, float64, of x (B, H/bh, bh, T, 1, 1, D) in blocks of bh heads: the nearest entry
    leaves no more than the shortest does, so that what a stage leaves is longer than what it was given by that at most.
    """
    assert not isinstance(scale.clip, tuple)
    sizes = table.double().cpu().square().sum(-1).sqrt()
    shortest, longest = ((1 + code.commuting) * one.sum(1).reshape(1, *x.shape[1:3], 1, 1, 1, 1)
                         for one in (sizes.amin(-1), sizes.amax(-1)))  # fmt: skip
    step = scale.clip * x.square().mean(OVER_BLOCK, keepdim=True).sqrt()
    step = step + deviation(step, scale.dtype)
    length = x.square().sum(6, keepdim=True).sqrt()
    return (length + step * shortest + ROUNDED * (length + step * longest)).expand_as(x)
