"""The laws of `kvdsl.testing` with kernels compiled for a GPU: every shipped scheme, and random ones of the language.

The same laws as on the torch backend and in the interpreter; here the inline assembly runs that neither of them sees.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from law_cases import LAW_NAMES, PLAIN, RARE, asked_of, fixed, holds

from kvdsl.testing import LAWS, cases, shapes

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("name", PLAIN)
def test_a_shipped_scheme_obeys_every_law(name: str) -> None:
    assert holds(PLAIN[name], "triton", examples=4) >= 2 * len(LAW_NAMES)


@pytest.mark.parametrize("name", RARE)
def test_a_scheme_of_rarer_parts_obeys_every_law(name: str) -> None:
    assert holds(RARE[name], "triton", examples=4) > len(LAW_NAMES)


@pytest.mark.parametrize("law", LAW_NAMES)
@fixed(examples=4)
@given(st.data())
def test_any_legal_scheme_obeys_the_law(law: str, data: Any) -> None:
    scheme = data.draw(asked_of(law))
    shape = data.draw(shapes(scheme, widest=96))
    LAWS[law](data.draw(cases(scheme, shape, "triton", kinds=LAWS[law].kinds, batch=2)))
