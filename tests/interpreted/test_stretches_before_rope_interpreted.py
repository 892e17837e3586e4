"""Keys behind rotary positions in stretches, or in fewer numbers than channels, in Triton's interpreter: each stretch
is decoded in planes of its own and mapped back to those of all channels."""

from __future__ import annotations

import pytest

from kvdsl.scheme import Bands, Codebook, Eigenbasis, PreRope, Rotate, Scheme, Store, Uniform, per_token
from kvdsl.schemes.kvtc import kvtc2_before_rope
from kvdsl.shape import Shape
from kvdsl.testing import LAWS, Case

PLAIN = Store()
KINDS = Bands((PLAIN, Store(Codebook(3, "normal"), scale=per_token())), channels=(0.25, 0.75))
CASES = {
    "stretches of three quarters": kvtc2_before_rope.with_(recent=None),
    "numbers as they are beside levels, of neighbouring pairs": Scheme(
        keys=Store(KINDS, transform=(PreRope(True), Rotate("orthogonal", seed=0))), values=PLAIN
    ),
    "eight numbers of 32": Scheme(
        keys=Store(Uniform(5), scale=per_token(), transform=(PreRope(), Eigenbasis("own", rank=8))), values=PLAIN
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_attention_is_over_what_is_held(name: str) -> None:
    LAWS["decode_is_attention"](Case(CASES[name], Shape(32, 1, 2), "triton", batch=1, tokens=70, seed=1))
