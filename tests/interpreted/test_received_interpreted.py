"""Attention that tokens receive, through interpreted Triton kernels."""

from __future__ import annotations

import pytest
import received_cases as cases
from law_cases import RARE
from received_cases import SMALL

from kvdsl.rules import shape_faults
from kvdsl.schemes import ALL
from kvdsl.shape import Shape
from kvdsl.testing import LAWS, Case
from kvdsl.window import windows

FEW = ("kivi2", "quarot4", "kvquant3", "turboquant2", "int8_tensor", "fp32", "gear2")
LAW_NAMES = ("received_attention_is_column_sums", "attention_given_is_attention_received", "poison_receives_nothing")


@pytest.mark.parametrize("name", SMALL)
def test_uniform_attention_is_received_as_worked_by_hand(name: str) -> None:
    cases.uniform_attention(SMALL[name], "triton")


def test_what_is_received_adds_up_over_rows() -> None:
    cases.sums_over_parts_of_the_rows(cases.SHORT, "triton")


def test_two_segments_receive_what_the_whole_does() -> None:
    cases.two_segments_are_one(cases.SHORT, "triton")


@pytest.mark.parametrize("name", SMALL)
def test_log_sum_exps_of_attention_are_taken(name: str) -> None:
    cases.sums_of_attention_are_taken(SMALL[name], "triton")


def test_rows_are_left_out_by_their_sums_or_places() -> None:
    cases.rows_are_left_out(cases.SHORT, "triton")


def test_rows_that_stand_nowhere_give_nothing() -> None:
    cases.nobody_gives_nothing("triton")


def test_a_sliding_window_is_refused() -> None:
    cases.windows_are_refused("triton")


@pytest.mark.parametrize("name", [*FEW, *RARE])
@pytest.mark.parametrize("law", LAW_NAMES[:2])
def test_some_schemes_obey_the_laws(law: str, name: str) -> None:
    """The scores are of the same lines as those of all schemes that the other laws are asked of."""
    scheme = {**ALL, **RARE}[name].with_(layers=())
    tokens = max(policy.sinks + policy.recent for policy in windows(scheme).values()) + 70
    shapes = (Shape(32, 1, 2), Shape(64, 2, 4), Shape(128, 1, 2), Shape(64, 4, 4))
    shape = next(shape for shape in shapes if not shape_faults(scheme, shape))
    LAWS[law](Case(scheme, shape, "triton", batch=1, tokens=tokens, seed=len(name)))


def test_poison_receives_nothing() -> None:
    LAWS[LAW_NAMES[2]](Case(cases.SHORT, Shape(64, 2, 6, "bf16"), "triton", batch=2, tokens=141, seed=3))
