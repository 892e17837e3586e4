"""Laws of `kvdsl.testing` in Triton's interpreter: shipped schemes, and random ones of the whole language.

One example a law on the smallest shape.  Left out for their time are the laws of caches over time and those that pack
or attend many times (constants, parts, chunks, poison, second times): the torch backend and a GPU are asked them all.
"""

from __future__ import annotations

from typing import Any

import pytest
from found_cases import FOUND
from hypothesis import given
from hypothesis import strategies as st
from law_cases import PLAIN, RARE, SIBLINGS, THOROUGH, fixed

from kvdsl.rules import shape_faults
from kvdsl.scheme import Recent, Scheme, Store, Uniform, per_channel, per_token
from kvdsl.schemes import ALL
from kvdsl.shape import Shape
from kvdsl.testing import LAWS, Case, schemes
from kvdsl.window import windows

QUICK = (
    "words_equal_the_reference", "decoding_equals_the_reference", "decode_is_attention", "extend_is_attention",
    "scores_are_products",
)  # fmt: skip
RAGGED = "neighbours_do_not_reach_the_words"  # packs five times: of shipped schemes those without a map are asked
SLOW = ("windows_and_padding_are_seen", "neighbours_do_not_reach_attention", "splits_do_not_matter")
ASKED = [name for name in PLAIN if THOROUGH or name not in SIBLINGS]
SHAPES = (Shape(32, 1, 2), Shape(64, 2, 4), Shape(128, 1, 2), Shape(64, 4, 4), Shape(576, 1, 3))


def _case(scheme: Any, seed: int, batch: int = 2) -> Case:
    """Tokens that fill the sinks, the window and a page, and a few more."""
    policies = windows(scheme).values()
    tokens = max(policy.sinks + policy.recent for policy in policies) + 70
    shape = next(shape for shape in SHAPES if not shape_faults(scheme, shape))
    return Case(scheme, shape, "triton", batch=batch, tokens=tokens, seed=seed)


@pytest.mark.parametrize("name", ASKED)
@pytest.mark.parametrize("law", QUICK)
def test_a_shipped_scheme_obeys_the_law(name: str, law: str) -> None:
    assert LAWS[law].applies(ALL[name])
    LAWS[law](_case(ALL[name], seed=1, batch=1))


@pytest.mark.parametrize("name", [name for name in ASKED if not (ALL[name].keys.turned or ALL[name].values.turned)])
def test_a_shipped_scheme_packs_each_sequence_alone(name: str) -> None:
    LAWS[RAGGED](_case(ALL[name], seed=1))


@pytest.mark.parametrize("name", RARE)
@pytest.mark.parametrize("law", [*QUICK, RAGGED])
def test_a_scheme_of_rarer_parts_obeys_the_law(law: str, name: str) -> None:
    LAWS[law](_case(RARE[name], seed=1, batch=1))


def test_a_long_record_s_codes_are_multiplied_by_scales_of_groups_as_halves() -> None:
    """Of 512 channels in groups of 16, which have no planes of their own: scales are given to channels in the loop."""
    LAWS["decode_is_attention"](Case(ALL["mla_nvfp4"], Shape(576, 1, 3), "triton", batch=1, tokens=70, seed=1))


@pytest.mark.parametrize("name", ["kivi2", "token4", "quarot4"])
@pytest.mark.parametrize("law", SLOW)
def test_some_shipped_schemes_obey_the_slower_laws(name: str, law: str) -> None:
    LAWS[law](_case(ALL[name], seed=2))


def test_queries_times_scales_in_half_precision_stay_within_the_bound() -> None:
    """Where 64 tokens share a channel's scale, queries are rounded, and their products with scale and offset again: of
    channels far from 0 that is more than one rounding of the largest number."""
    keys = Store(Uniform(4), scale=per_channel(tokens=64))
    scheme = Scheme(keys=keys, values=Store(Uniform(4), scale=per_token()), recent=Recent(64))
    case = Case(scheme, Shape(64, 2, 8), "triton", batch=1, tokens=200, kind="outlier_channel", seed=7)
    LAWS["extend_is_attention"](case)


@pytest.mark.parametrize("name", FOUND)
def test_a_case_that_once_broke_a_law(name: str) -> None:
    law, scheme, shape, numbers = FOUND[name]
    assert LAWS[law].applies(scheme)
    LAWS[law](Case(scheme, shape, "triton", **numbers))


@pytest.mark.parametrize("law", ["words_equal_the_reference", "decoding_equals_the_reference", "decode_is_attention"])
@fixed(examples=4)
@given(st.data())
def test_any_legal_scheme_obeys_the_law(law: str, data: Any) -> None:
    fits = schemes(longest=32).filter(lambda s: any(not shape_faults(s, shape) for shape in SHAPES))
    LAWS[law](_case(data.draw(fits), data.draw(st.integers(0, 99)), batch=1))
