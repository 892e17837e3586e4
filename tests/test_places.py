"""Kernels that are told where tokens stand, on the torch backend; how they are kept, compiled and shown."""

from __future__ import annotations

from pathlib import Path

import place_cases
import pytest
from place_cases import SCHEMES

from kvdsl.codegen import build
from kvdsl.codegen.show import View, show
from kvdsl.scheme import Largest, PreRope, Scheme, Tier
from kvdsl.shape import Shape
from kvdsl.snapshot import identity


@pytest.mark.parametrize("name", SCHEMES)
def test_tokens_may_stand_anywhere(name: str) -> None:
    place_cases.tokens_may_stand_anywhere(name, "torch")


@pytest.mark.parametrize("name", SCHEMES)
def test_tokens_receive_the_same_anywhere(name: str) -> None:
    place_cases.tokens_receive_the_same_anywhere(name, "torch")


def test_a_wrong_position_is_seen() -> None:
    place_cases.a_wrong_position_is_seen("torch")


def test_places_are_asked_for() -> None:
    place_cases.places_are_asked_for("torch")


def test_kernels_of_tokens_in_any_order_are_others() -> None:
    """Kept in a file of their own; the shape says so, and only where it is so."""
    plain, placed = (build(SCHEMES["plain"], Shape(32, 1, 1, placed=both), "torch") for both in (False, True))
    assert plain.path != placed.path and plain.module is not placed.module
    assert [("placed" in identity(one)["shape"]) for one in (plain, placed)] == [False, True]
    assert "placed" not in repr(plain.shape) and repr(placed.shape).endswith("softcap=False, placed=True)")


def test_tiers_before_rope_are_shown_with_what_they_read() -> None:
    four = place_cases.FOUR
    before = Scheme(
        keys=four.with_(transform=PreRope()), values=four, tiers=(Tier(4, top=9), Tier(16)), router=Largest()
    )
    view = View("before", before, Shape(64, 1, 1))
    _, plan = show(view, "plan")
    told = "places   tokens stand in any order: the main loop masks, and loads where each stands, and 256 bytes of"
    assert [line.startswith(told) for line in plan].count(True) == 1
    _, cost = show(view, "cost")
    assert any(line.startswith("tiers[0]: keys stand before their rotary positions") for line in cost)


def test_the_kernels_of_a_tier_compile_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading: decode of keys before their positions, tokens in any order."""
    pytest.importorskip("triton")
    from kvdsl.codegen import render, store
    from kvdsl.codegen.aot import compile_in_child
    from kvdsl.codegen.launches import launches
    from kvdsl.codegen.lint import faults_in
    from kvdsl.codegen.plan import plan_for

    cache = Path(__file__).resolve().parent.parent / "build" / "aot"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    plan = plan_for(place_cases.keys(place_cases.FOUR.with_(transform=PreRope())), Shape(128, 8, 32, placed=True))
    text = render(plan, "triton", "placed")
    path = store.keep("placed", plan, "triton", text)
    records = launches(plan, text)
    assert not faults_in(text, records)
    (kernel,) = compile_in_child(path, [one for one in records if one.kernel == "decode"], ["sm_90"])
    assert kernel.kernel == "decode" and kernel.loop_mma > 0 and kernel.spills == 0
