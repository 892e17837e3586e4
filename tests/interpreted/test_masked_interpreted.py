"""Two sketches of keys in Triton's interpreter: however many channels are chosen, how often, and of whatever planes."""

from __future__ import annotations

import pytest

from kvdsl.scheme import Recent, Scheme, Sketch, Store, TopChannels, Uniform, per_token
from kvdsl.shape import Shape
from kvdsl.testing import LAWS, Case


def of(whole: int, own: int, count: int, tokens: int) -> Scheme:
    """Sketches of so many rows, the `count` largest channels of every so many tokens apart."""
    keys = Store(Sketch(whole), outliers=TopChannels(count, per=tokens, store=Store(Sketch(own))))
    return Scheme(keys=keys, values=Store(Uniform(2), scale=per_token()), recent=Recent(64))


CASES = {
    "one map, two choices a tile": of(128, 128, 8, 32),
    "one map, one choice a tile": of(256, 256, 8, 64),
    "two maps, one choice, narrow planes": of(256, 64, 16, 64),
    "two maps, two choices": of(128, 256, 16, 32),
    "planes no power of two, lanes without a channel": of(160, 160, 24, 32),
    "more channels than a product is deep": of(128, 128, 40, 64),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("law", ["scores_are_products", "decode_is_attention"])
def test_both_sketches_are_scored(name: str, law: str) -> None:
    """Of clean pages and of edges."""
    LAWS[law](Case(CASES[name], Shape(64, 1, 2), "triton", batch=1, tokens=200, seed=1))


def test_queries_and_heads_that_fill_no_product() -> None:
    LAWS["scores_are_products"](
        Case(CASES["one map, two choices a tile"], Shape(64, 2, 6), "triton", batch=1, tokens=130, seed=2)
    )


def test_in_float32() -> None:
    LAWS["decode_is_attention"](
        Case(CASES["one map, two choices a tile"], Shape(64, 1, 1, "fp32"), "triton", batch=1, tokens=130, seed=3)
    )
