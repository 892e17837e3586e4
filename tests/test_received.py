"""Attention that tokens receive, on the torch backend: cases worked by hand or two ways, and memory that is bounded."""

from __future__ import annotations

import pytest
import received_cases as cases
import torch
from received_cases import SHORT, SMALL

from kvdsl.codegen import torch_received
from kvdsl.shape import Shape
from kvdsl.testing import Case
from kvdsl.testing.received import probes_of, received


@pytest.mark.parametrize("name", SMALL)
def test_uniform_attention_is_received_as_worked_by_hand(name: str) -> None:
    cases.uniform_attention(SMALL[name], "torch")


@pytest.mark.parametrize("name", SMALL)
def test_what_is_received_adds_up_over_rows(name: str) -> None:
    cases.sums_over_parts_of_the_rows(SMALL[name], "torch")


@pytest.mark.parametrize("name", SMALL)
def test_two_segments_receive_what_the_whole_does(name: str) -> None:
    cases.two_segments_are_one(SMALL[name], "torch")


@pytest.mark.parametrize("name", SMALL)
def test_log_sum_exps_of_attention_are_taken(name: str) -> None:
    cases.sums_of_attention_are_taken(SMALL[name], "torch")


def test_rows_are_left_out_by_their_sums_or_places() -> None:
    cases.rows_are_left_out(cases.SHORT, "torch")


def test_rows_that_stand_nowhere_give_nothing() -> None:
    cases.nobody_gives_nothing("torch")


def test_a_sliding_window_is_refused() -> None:
    cases.windows_are_refused("torch")


def test_spans_of_tokens_and_rows_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """One page and one row at a time give what all give at once."""
    case = Case(SHORT, Shape(32, 2, 4), "torch", batch=2, tokens=260, seed=9)
    step, position = probes_of(case)
    whole = received(case, step, position)
    monkeypatch.setattr(torch_received, "PACK_AT_ONCE", 1)
    monkeypatch.setattr(torch_received, "SCORES_AT_ONCE", 1)
    for got, want in zip(received(case, step, position), whole, strict=True):
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)
