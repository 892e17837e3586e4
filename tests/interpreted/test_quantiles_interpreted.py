"""Ranges that end at a quantile of sizes, and scales with a floor, in Triton's interpreter."""

from __future__ import annotations

from kvdsl.scheme import Float, Recent, Scheme, Store, Uniform, per_channel, per_token
from kvdsl.shape import Shape
from kvdsl.testing import LAWS, Case


def test_packed_words_are_those_of_the_definition() -> None:
    """Blocks along either axis, of numbers many of which are equal."""
    keys, values = (
        Store(Uniform(2), scale=scale)
        for scale in (per_token(range="absmax", quantile=0.9), per_channel(tokens=32, quantile=0.75))
    )
    scheme = Scheme(keys=keys, values=values, recent=Recent(32))
    LAWS["words_equal_the_reference"](Case(scheme, Shape(32, 1, 1), "triton", batch=1, tokens=40, kind="ties", seed=1))


def test_packed_scales_are_no_less_than_their_floor() -> None:
    """Some of either side's blocks measure less, and their numbers have other codes."""
    keys = Store(Float("e2m1"), scale=per_token(channels=8, dtype="e4m3", floor=0.5))
    values = Store(Uniform(2), scale=per_channel(tokens=32, floor=1.0))
    scheme = Scheme(keys=keys, values=values, recent=Recent(32))
    LAWS["words_equal_the_reference"](
        Case(scheme, Shape(32, 1, 1), "triton", batch=1, tokens=40, kind="normal", seed=1)
    )
