"""Laws of caches with tiers in Triton's interpreter: of shipped schemes whose kernels differ, their windows short."""

from __future__ import annotations

import pytest
from tier_cases import case

from kvdsl.testing import LAWS

NAMES = ("zipcache", "mikv", "h2o")  # of the others tokens go other ways through the same kernels


@pytest.mark.parametrize("law", ["tiers_hold_what_is_defined", "segments_merge_to_one_softmax"])
@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_scheme_with_tiers_obeys_the_law(name: str, law: str) -> None:
    LAWS[law](case(name, "triton", tokens=84, batch=1))
