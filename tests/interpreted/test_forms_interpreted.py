"""Many queries over tokens that are decoded once, in Triton's interpreter."""

from __future__ import annotations

import form_cases
import pytest
import torch
from law_cases import RARE
from tier_cases import case as tier_case

from kvdsl.codegen import forms
from kvdsl.schemes import ALL
from kvdsl.shape import Shape
from kvdsl.testing import LAWS, Case
from kvdsl.testing.attention import attend, require_close, step_of
from kvdsl.window import windows

NAMES = ("token4", "kivi2", "quarot4", "turboquant2", "qjl", "fp16", "int8_tensor", "gear2", "kvquant3")
RARER = ("several heads", "low rank", "single numbers", "thresholds", "chosen channels", "bands")


@pytest.mark.parametrize("name", [*NAMES, *RARER])
def test_decoding_once_is_attention(name: str) -> None:
    scheme = (ALL | RARE)[name]
    tokens = max(one.sinks + one.recent for one in windows(scheme).values()) + 70
    shape = Shape(128, 2, 2) if name in ("several heads", "low rank") else Shape(64, 1, 2)
    LAWS["decoding_once_is_attention"](Case(scheme, shape, "triton", tokens=tokens, seed=5))


ODD = {dtype: Shape(80, 1, 3, dtype, softcap=True) for dtype in ("bf16", "fp32")}
"""Heads of 80 channels, which fill no power of two."""


@pytest.mark.parametrize("dtype", ODD)
@pytest.mark.parametrize("window", [None, 50])
def test_ragged_sequences_of_any_dtype_capped(dtype: str, window: int | None) -> None:
    one = form_cases.case("token4", "triton", ODD[dtype], tokens=170)
    step = step_of(one, 50, window=window)
    require_close(one, step, attend(one, step, form="dense"))


def test_rounded_queries_meet_decoded_keys() -> None:
    form_cases.rounded_queries_meet_decoded_keys("triton")


def test_chunks_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    form_cases.chunks_go_on("kivi2", "triton", monkeypatch)


def test_segments_may_be_read_in_any_form() -> None:
    form_cases.segments_may_be_read_in_any_form("triton")


@pytest.mark.parametrize("name", ["plain", "mixed channels"])
def test_places_may_be_any(name: str) -> None:
    form_cases.places_may_be_any(name, "triton")


@pytest.mark.parametrize("name", ["zipcache", "mikv"])
def test_tiers_may_be_decoded_once(name: str) -> None:
    form_cases.tiers_may_be_decoded_once(tier_case(name, "triton", tokens=84, batch=1))


def test_the_cheapest_form_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the model: where decoding costs nothing, decoding once; not for a plan that must not depend on it."""
    one = form_cases.case("token4", "triton", tokens=100)
    step = step_of(one, 9)
    read, dense = (attend(one, step, form=form) for form in ("extend", "dense"))
    assert not torch.equal(read[1], dense[1])
    assert torch.equal(attend(one, step)[1], read[1])
    monkeypatch.setattr(forms, "dense_cost", lambda *_: 0.0)
    assert one.kernels.form(9, 100) == "dense"
    assert torch.equal(attend(one, step)[1], dense[1])
    assert torch.equal(attend(one, step, 2)[1], attend(one, step, 2, form="extend")[1])
