"""Laws of caches with tiers in Triton's interpreter: of shipped schemes whose kernels differ, their windows short."""

from __future__ import annotations

import pytest
from tier_cases import BEFORE_ROPE, case

from kvdsl.scheme import Recent, Scheme, Tier
from kvdsl.shape import Shape
from kvdsl.testing import LAWS, Case
from kvdsl.testing.tier_strategies import ALONE, FED

NAMES = ("zipcache", "mikv", "h2o")  # of the others tokens go other ways through the same kernels


@pytest.mark.parametrize("law", ["tiers_hold_what_is_defined", "segments_merge_to_one_softmax"])
@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_scheme_with_tiers_obeys_the_law(name: str, law: str) -> None:
    LAWS[law](case(name, "triton", tokens=84, batch=1))


@pytest.mark.parametrize("law", ["tiers_hold_what_is_defined", "segments_merge_to_one_softmax"])
@pytest.mark.parametrize("name", ["new", "down", "any", "some wait in groups"])
def test_keys_before_rope_in_tiers_obey_the_law(name: str, law: str) -> None:
    """With a sliding window where tokens move down."""
    shape = Shape(32, 2, 4, placed=name == "down")
    LAWS[law](Case(BEFORE_ROPE[name], shape, "triton", tokens=45, seed=1))


def test_keys_whose_errors_are_fed_forward_obey_the_law() -> None:
    scheme = Scheme(FED[0], ALONE[0], recent=Recent(8, "whole"), tiers=(Tier(),))
    LAWS["tiers_hold_what_is_defined"](Case(scheme, Shape(32, 1, 2), "triton", batch=2, tokens=20, seed=1))
