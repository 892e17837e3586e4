"""The laws of `kvdsl.testing` on the torch backend: every shipped scheme, and random ones of the whole language."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from law_cases import LAW_NAMES, fixed, holds

from kvdsl.errors import SchemeError
from kvdsl.scheme import PreRope, Scheme, Store, Uniform, per_token
from kvdsl.schemes import ALL
from kvdsl.testing import LAWS, LawBroken, applicable, cases, check, faulty_schemes, schemes, shapes


@pytest.mark.parametrize("name", ALL)
def test_a_shipped_scheme_obeys_every_law(name: str) -> None:
    assert holds(ALL[name], "torch", examples=5) >= 5 * len(LAW_NAMES) // 2


@pytest.mark.parametrize("law", LAW_NAMES)
@fixed(examples=30)
@given(st.data())
def test_any_legal_scheme_obeys_the_law(law: str, data: Any) -> None:
    scheme: Scheme = data.draw(schemes().filter(LAWS[law].applies))
    shape = data.draw(shapes(scheme, widest=96))
    LAWS[law](data.draw(cases(scheme, shape, "torch", kinds=LAWS[law].kinds, batch=2)))


@fixed(examples=300)
@given(faulty_schemes())
def test_one_mistake_is_refused_by_the_name_of_its_place(faulty: Any) -> None:
    make, place = faulty
    with pytest.raises(SchemeError) as refusal:
        make()
    assert place in str(refusal.value)


def test_a_broken_law_is_told_with_its_case(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvdsl.testing import codes

    monkeypatch.setattr(codes, "bound", lambda store, x, params, side, at: x.double().abs() * 0)
    with pytest.raises(LawBroken, match=r"errors_stay_within_the_bound: decoded .* wanted .* within 0\nin Case\("):
        check(ALL["kivi2"], backend="torch", examples=3, laws=["errors_stay_within_the_bound"])


def test_the_same_seed_asks_the_same() -> None:
    asked = [check(ALL["token4"], backend="torch", examples=3, seed=4, laws=["decode_is_attention"]) for _ in range(2)]
    assert asked[0] == asked[1]


def test_every_law_is_made_of_some_scheme() -> None:
    """Of a shipped one, or of one that stores keys without their positions."""
    rotary = Scheme(keys=Store(Uniform(4), scale=per_token(), transform=PreRope()), values=Store())
    assert {law.name for scheme in (*ALL.values(), rotary) for law in applicable(scheme)} == set(LAW_NAMES)
