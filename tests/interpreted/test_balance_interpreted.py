"""Tiles with factors along both axes, in Triton's interpreter."""

from __future__ import annotations

import pytest

from kvdsl.scheme import Balance, Recent, Rotate, Scheme, Sinks, Store, Uniform, per_channel, per_token
from kvdsl.shape import Shape
from kvdsl.testing import LAWS, Case

TILES = Scheme(
    keys=Store(Uniform(4), scale=per_channel(tokens=32), transform=(Rotate("hadamard"), Balance(32, loops=2))),
    values=Store(Uniform(2), scale=per_token(), transform=Balance(32, loops=2)),
    sinks=Sinks(3),
    recent=Recent(32),
)


@pytest.mark.parametrize("law", ["words_equal_the_reference", "decoding_equals_the_reference", "decode_is_attention"])
def test_tiles_obey_the_law(law: str) -> None:
    """Pages of two tiles, and one of the exact tokens behind."""
    LAWS[law](Case(TILES, Shape(32, 1, 2), "triton", batch=1, tokens=140, seed=1))
