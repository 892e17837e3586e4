"""Kernels that are told where tokens stand, in Triton's interpreter."""

from __future__ import annotations

import place_cases
import pytest
from place_cases import SCHEMES


@pytest.mark.parametrize("name", SCHEMES)
def test_tokens_may_stand_anywhere(name: str) -> None:
    place_cases.tokens_may_stand_anywhere(name, "triton")


@pytest.mark.parametrize("name", ["plain", "before RoPE", "mixed channels", "single numbers"])
def test_tokens_receive_the_same_anywhere(name: str) -> None:
    place_cases.tokens_receive_the_same_anywhere(name, "triton")


def test_a_wrong_position_is_seen() -> None:
    place_cases.a_wrong_position_is_seen("triton")
