"""The multiplications that remain in the main loop outside the tensor cores, worked out by hand."""

from __future__ import annotations

from fractions import Fraction as F

import pytest

from kvdsl import Block, Codebook, Float, Polar, Recent, Scale, Scheme, Store, Uniform, per_token
from kvdsl.codegen.multiplications import multiplications
from kvdsl.codegen.placement import When
from kvdsl.codegen.plan import plan_for
from kvdsl.codegen.show import View, show
from kvdsl.scheme import SIDES
from kvdsl.schemes import fp16, int8_tensor, int8_token_head, kivi2, kvtq, kvtq_2bit
from kvdsl.shape import Shape

WIDE = Shape(128, 8, 32)
DECODED = Scheme(both=Store(Uniform(4), scale=per_token(8)))
POLAR = Scheme(both=Store(Float("fp16"), transform=Polar()))
DECODED_TWICE = Scheme(both=Store(Codebook(2, levels=(-0.5, 0, 0.5)), scale=Scale(Block(8, 8))), recent=Recent(8))


@pytest.mark.parametrize(
    ("scheme", "keys", "values"),
    [
        (fp16, (0, 0, 0), (0, 0, 0)),
        # keys, each 32 tokens: every channel of the query by scale and by offset, three planes' sums of 16 lanes by
        # powers of 2; each token by 2^24.  values, each token and group: the weight by scale and by offset
        (kivi2, (0, F(2, 32) + F(3 * 16, 32 * 128) + F(1, 128), 0), (0, F(4 * 2, 128), 0)),
        # keys, each token: the dot product by 2^24 and the scale, the query's total by the offset
        (int8_token_head, (0, F(3, 128), 0), (0, F(1, 128), 0)),
        # 2^24 is all that stays of a calibrated scale
        (int8_tensor, (0, F(1, 128), 0), (0, 0, 0)),
        # each token and group of 64: 2^24 and the scale; the weight by the scale
        (kvtq_2bit, (0, F(2 * 2, 128), 0), (0, F(2, 128), 0)),
        (kvtq, (0, F(2 * 2, 128), F(1, 2)), (0, F(2, 128), F(1, 2))),
        (DECODED, (1, 0, 0), (1, 0, 0)),
        # a pair: an angle to quarter turns, two products of them off it, the square of the rest, 4 and 4 in the series
        # of sine and cosine, and the radius twice
        (POLAR, (7, 0, 0), (7, 0, 0)),
        (DECODED_TWICE, (2, 0, 0), (2, 0, 0)),
    ],
)
def test_what_remains(scheme: Scheme, keys: tuple[F, ...], values: tuple[F, ...]) -> None:
    plan = plan_for(scheme, WIDE)
    for side, right in zip(SIDES, (keys, values), strict=True):
        found = multiplications(plan, plan.side(side))
        assert (found.decoding, found.scaling, found.unpacking) == right
        assert (found.decoding > 0) == (plan.side(side).when is When.IN_LOOP)


def test_it_is_shown_with_the_cost() -> None:
    data, lines = show(View("kvtq", kvtq, WIDE), "cost")
    assert data["keys"]["multiplications"] == {"decoding": 0, "scaling": 1 / 32, "unpacking": 0.5}
    assert any(
        line.split(maxsplit=1)
        == ["values", "0 to decode it, 0.01562 a query row for scales, 0.5 of integers to unpack it"]
        for line in lines
    )
