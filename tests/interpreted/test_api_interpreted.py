"""kvdsl.roundtrip, scores and attend through interpreted Triton kernels."""

from __future__ import annotations

import pytest
from api_cases import SCHEMES, agrees_on_attend, agrees_on_roundtrip, agrees_on_scores

import kvdsl


def test_the_interpreter_is_what_runs_when_no_backend_is_asked_for() -> None:
    assert kvdsl.build(SCHEMES["rolling"], kvdsl.Shape(32)).why == "triton, interpreted (TRITON_INTERPRET=1)"


@pytest.mark.parametrize("window", [True, False])
@pytest.mark.parametrize("name", SCHEMES)
def test_roundtrip_is_the_definition(name: str, window: bool) -> None:
    agrees_on_roundtrip(name, window, backend="triton")


@pytest.mark.parametrize("name", SCHEMES)
def test_scores_are_near_the_definition(name: str) -> None:
    agrees_on_scores(name, True, backend="triton")


@pytest.mark.parametrize("window", [True, False])
@pytest.mark.parametrize("name", ["whole", "static"])
def test_attend_is_near_the_definition(name: str, window: bool) -> None:
    agrees_on_attend(name, window, 3, backend="triton")
