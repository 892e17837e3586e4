"""Pairs of planes that rotary positions turn in float16, in Triton's interpreter: whichever channels a model turns."""

from __future__ import annotations

import pytest

from kvdsl.codegen.plan import plan_for
from kvdsl.scheme import Permute, PreRope, Scheme, Store, Uniform, per_token
from kvdsl.schemes import ALL
from kvdsl.shape import Shape
from kvdsl.testing import LAWS, Case

WHOLE, PART, HALF = 1, 5, 7  # seeds: all channels are rotated, all but two, a half
TOKEN = Scheme(
    keys=Store(Uniform(4), scale=per_token(), transform=PreRope()), values=Store(Uniform(4), scale=per_token())
)
ORDERED = Scheme(
    keys=Store(Uniform(4), scale=per_token(channels=8), transform=(PreRope(), Permute("range"))),
    values=Store(Uniform(4), scale=per_token()),
)
CASES = {
    "levels of 4 bits": (ALL["nuq4"], 64, WHOLE),
    "levels of 4 bits, a part rotated": (ALL["nuq4"], 64, PART),
    "levels of 3 bits, a half rotated": (ALL["nuq3"], 128, HALF),
    "levels of 2 bits": (ALL["nuq2"], 128, WHOLE),
    "single numbers, a part rotated": (ALL["kvquant4"], 64, PART),
    "scales of tokens": (TOKEN, 64, WHOLE),
    "scales of tokens, a half rotated": (TOKEN, 64, HALF),
    "channels in an order": (ALL["skvq2"], 128, WHOLE),
    "channels in an order, a part rotated": (ALL["skvq2"], 128, PART),
    "channels in an order, groups narrower than a plane": (ORDERED, 64, HALF),
}


@pytest.mark.parametrize("name", CASES)
def test_attention_is_over_what_is_held(name: str) -> None:
    """Of clean pages and of edges."""
    scheme, dim, seed = CASES[name]
    one = Case(scheme, Shape(dim, 1, 2), "triton", batch=1, tokens=200, seed=seed)
    assert plan_for(scheme, one.shape).in_pairs
    LAWS["decode_is_attention"](one)
