"""Channels behind rotary positions in an order of their own, scaled and shifted, in Triton's interpreter."""

from __future__ import annotations

import pytest

from kvdsl.scheme import ChannelScale, ChannelShift, Float, Permute, PreRope, Scheme, Store, Uniform, per_token
from kvdsl.shape import Shape
from kvdsl.testing import LAWS, Case

VALUES = Store(Uniform(4), scale=per_token())
WHOLE, PART, HALF = 1, 5, 7  # seeds: all channels are rotated, 30 of 32, a half
CASES = {
    "order": (Store(Uniform(2), scale=per_token(channels=32), transform=(PreRope(), Permute())), 96, WHOLE),
    "order, a part rotated": (Store(Uniform(4), scale=per_token(), transform=(PreRope(), Permute())), 32, PART),
    "order of neighbours, factors, shift": (
        Store(Uniform(4), scale=per_token(), transform=(PreRope(True), ChannelShift(), ChannelScale(), Permute("sum"))),
        32,
        HALF,
    ),
    "factors of digits": (
        Store(Uniform(levels=3), scale=per_token(channels=16), transform=(PreRope(), ChannelScale("absmax"))),
        32,
        WHOLE,
    ),
    "shift of float32 numbers": (
        Store(Float("fp32"), transform=(PreRope(), Permute(), ChannelShift("learned"))),
        32,
        WHOLE,
    ),
}


@pytest.mark.parametrize("law", ["decode_is_attention", "positions_come_back"])
@pytest.mark.parametrize("name", CASES)
def test_attention_is_over_what_is_held(name: str, law: str) -> None:
    keys, dim, seed = CASES[name]
    LAWS[law](Case(Scheme(keys=keys, values=VALUES), Shape(dim, 2, 4), "triton", batch=1, tokens=70, seed=seed))
