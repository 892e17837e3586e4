"""The laws of `kvdsl.testing` on the torch backend: every shipped scheme, and random ones of the whole language."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
from found_cases import FOUND
from hypothesis import given
from hypothesis import strategies as st
from law_cases import LAW_NAMES, PLAIN, RARE, SIBLINGS, THOROUGH, asked_of, fixed, holds

from kvdsl.codes import Code
from kvdsl.errors import SchemeError
from kvdsl.scheme import (
    Codebook,
    PreRope,
    Recent,
    Scheme,
    Store,
    Uniform,
    per_channel,
    per_token,
)
from kvdsl.schemes import ALL
from kvdsl.shape import Shape
from kvdsl.testing import LAWS, Case, LawBroken, applicable, cases, check, faulty_schemes, few_shapes, report, shapes


@pytest.mark.parametrize("name", PLAIN)
def test_a_shipped_scheme_obeys_every_law(name: str) -> None:
    examples = 1 if name in SIBLINGS and not THOROUGH else 2
    assert holds(ALL[name], "torch", examples=examples) >= len(applicable(ALL[name].with_(layers=())))


@pytest.mark.parametrize("law", LAW_NAMES)
@fixed(examples=12)
@given(st.data())
def test_any_legal_scheme_obeys_the_law(law: str, data: Any) -> None:
    scheme: Scheme = data.draw(asked_of(law))
    shape = data.draw(shapes(scheme, widest=96))
    LAWS[law](data.draw(cases(scheme, shape, "torch", kinds=LAWS[law].kinds, batch=2)))


@pytest.mark.parametrize("name", FOUND)
def test_a_case_that_once_broke_a_law(name: str) -> None:
    law, scheme, shape, numbers = FOUND[name]
    assert LAWS[law].applies(scheme)
    LAWS[law](Case(scheme, shape, "torch", **numbers))


@fixed(examples=200)
@given(faulty_schemes())
def test_one_mistake_is_refused_by_the_name_of_its_place(faulty: Any) -> None:
    make, place = faulty
    with pytest.raises(SchemeError) as refusal:
        make()
    assert place in str(refusal.value)


@pytest.mark.parametrize("code", [Uniform(1, grid="cells"), Codebook(levels=(-1, 1))], ids=str)
def test_no_constant_is_asked_of_a_least_scale_without_a_level_of_0(code: Code) -> None:
    """Every level lies beside the number then; a scale of 0 puts all of them onto it."""
    law = LAWS["a_constant_block_is_itself"]
    for floor in (0.0, 0.25):
        store = Store(code, scale=per_channel(tokens=2, range="minmax", floor=floor))
        assert law.applies(Scheme(both=store, recent=Recent(2))) is (floor == 0.0)


def test_a_broken_law_is_told_with_its_case(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvdsl.testing import codes

    monkeypatch.setattr(codes, "bound", lambda store, x, params, side, at: x.double().abs() * 0)
    with pytest.raises(LawBroken, match=r"errors_stay_within_the_bound: decoded .* wanted .* within 0\nin Case\("):
        check(ALL["kivi2"], backend="torch", examples=3, laws=["errors_stay_within_the_bound"])


def test_the_same_seed_asks_the_same() -> None:
    asked = [check(ALL["token4"], backend="torch", examples=3, seed=4, laws=["decode_is_attention"]) for _ in range(2)]
    assert asked[0] == asked[1]


def test_what_is_drawn_does_not_depend_on_what_was_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else examples differ from worker to worker, and a run may fail where another did not."""

    def drawn() -> list[int]:
        found = []

        @fixed(examples=100)
        @given(st.integers(0, 10**9))
        def ask(number: int) -> None:
            found.append(number)

        ask()
        return found

    before = drawn()
    (tmp_path / "full_of_numbers.py").write_text("\n".join(f"X{i} = {i * 1_234_567}" for i in range(1, 400)))
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("full_of_numbers")
    assert drawn() == before


def test_schemes_of_layers_are_asked_too() -> None:
    """Each once, and told apart by its place."""
    scheme = ALL["token4"].with_(layers={0: ALL["token2"], (3, 4): ALL["token4"], 5: ALL["token2"]})
    found = list(report(scheme, examples=1, laws=("words_equal_the_reference",)))
    assert [(result.place, result.examples) for result in found] == [("", 1), ("layers[0]", 1)]


def test_laws_are_asked_at_the_shapes_that_are_given() -> None:
    """So one that the scheme does not fit is told: two heads are rotated together."""

    def failure(kv_heads: int) -> str | None:
        shapes = (Shape(64, kv_heads),)
        (found,) = report(RARE["several heads"], examples=1, laws=("bytes_are_counted",), shapes=shapes)
        return found.failure

    assert failure(6) is None
    assert "kv_heads=5" in (failure(5) or "")


def test_compiled_kernels_are_asked_for_one_part_of_the_channels_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a compilation of minutes; shapes together turn all, a half, a quarter, and all but two."""
    monkeypatch.setattr(importlib.import_module("kvdsl.testing.cases"), "interpreted", lambda: False)
    scheme, shares = ALL["nuq3"], set[float]()
    for shape in few_shapes(scheme):
        parts = [{Case(scheme, shape, backend, seed=i).rotated for i in range(40)} for backend in ("triton", "torch")]
        assert len(parts[0]) == 1 and parts[0] < parts[1] and len(parts[1]) == 4
        shares |= {one / shape.head_dim for one in parts[0]}
    assert {0.25, 0.5, 1.0} < shares and len(shares) == 4


def test_every_law_is_made_of_some_scheme() -> None:
    """Of a shipped one, or of one that stores keys without their positions, or of tiers by position."""
    rotary = Scheme(keys=Store(Uniform(4), scale=per_token(), transform=PreRope()), values=Store())
    assert {law.name for scheme in (*PLAIN.values(), rotary) for law in applicable(scheme)} == set(LAW_NAMES)
