"""Heads that are rotated together, in Triton's interpreter: what names of their own keep apart, side by side.

`test_laws_interpreted` has keys in the loop under a Hadamard matrix, and values whose scales are of tokens' blocks."""

from __future__ import annotations

import pytest

from kvdsl.scheme import (
    ALL,
    Block,
    ChannelShift,
    Codebook,
    Float,
    PreRope,
    Rotate,
    Scale,
    Scheme,
    Store,
    Uniform,
    per_token,
)
from kvdsl.shape import Shape
from kvdsl.testing import LAWS, Case

HEADS = Scale(Block(ALL, ALL, 1), dtype="fp32", when="calibrated")
CASES = {
    "scales of two levels, and words shared by two tokens": (
        Scheme(
            keys=Store(Float("e2m1"), scale=per_token(16, dtype="e4m3", scale=HEADS), transform=Rotate(heads=2)),
            values=Store(Uniform(3), scale=per_token(), transform=(ChannelShift(), Rotate(heads=2))),
        ),
        Shape(32, 2, 4),
    ),
    "calibrated scales, and what is left": (
        Scheme(
            keys=Store(Uniform(4), scale=Scale(Block(ALL, 16), when="calibrated"), transform=Rotate(heads=2)),
            values=Store(
                Uniform(2),
                scale=per_token(),
                transform=Rotate("orthogonal", heads=2, seed=1),
                residual=Store(
                    Uniform(levels=3), scale=per_token(), transform=Rotate("random_hadamard", heads=4, seed=2)
                ),
            ),
        ),
        Shape(32, 4, 4),
    ),
    "three heads in the loop, levels of the parameters": (
        Scheme(
            keys=Store(
                Codebook(2, "calibrated"),
                scale=per_token(8),
                transform=(PreRope(), ChannelShift(), Rotate("orthogonal", heads=3, seed=0)),
            ),
            values=Store(Float("fp16"), transform=Rotate("orthogonal", heads=3, seed=4)),
        ),
        Shape(32, 3, 3),
    ),
    "four heads of float32 numbers in the loop": (
        Scheme(keys=Store(Float("fp32"), transform=(PreRope(True), Rotate(heads=4))), values=Store(Float("fp16"))),
        Shape(32, 4, 8),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_attention_is_over_what_is_held(name: str) -> None:
    scheme, shape = CASES[name]
    LAWS["decode_is_attention"](Case(scheme, shape, "triton", batch=1, tokens=70, seed=1))
