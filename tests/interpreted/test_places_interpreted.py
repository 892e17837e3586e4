"""Kernels that are told where tokens stand, in Triton's interpreter."""

from __future__ import annotations

import place_cases
import pytest

NAMES = ("plain", "before RoPE", "mixed channels", "an order of channels", "single numbers")


@pytest.mark.parametrize("name", NAMES)
def test_tokens_may_stand_anywhere(name: str) -> None:
    place_cases.tokens_may_stand_anywhere(name, "triton")


@pytest.mark.parametrize("name", ["before RoPE", "single numbers"])
def test_tokens_receive_the_same_anywhere(name: str) -> None:
    place_cases.tokens_receive_the_same_anywhere(name, "triton")


def test_a_wrong_position_is_seen() -> None:
    place_cases.a_wrong_position_is_seen("triton")
