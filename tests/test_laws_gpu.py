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

from kvdsl.shape import Shape
from kvdsl.testing import LAWS, cases, few_shapes, shapes

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


QUICKER = {name: RARE[name].with_(**{"keys.code.bits": 4}) for name in ("thresholds", "vectors")}
"""Their keys of 3 and 2 bits, 16 and 32 planes of channels, take the compiler minutes a kernel."""
KNOWN = PLAIN | RARE | QUICKER
"""Schemes that are shipped, and those of rarer parts."""
AT = [
    pytest.param(name, shape, id=f"{name}-{shape.q_heads}x{shape.head_dim}")
    for name, scheme in KNOWN.items()
    for shape in few_shapes(scheme)
]
"""One shape a test: nearly all the time is the compiler's, and each shape has kernels of its own."""


@pytest.mark.parametrize(("name", "shape"), AT)
def test_a_scheme_obeys_every_law(name: str, shape: Shape) -> None:
    assert holds(KNOWN[name], "triton", examples=2, shapes=(shape,)) > len(LAW_NAMES)


@pytest.mark.parametrize("law", LAW_NAMES)
@fixed(examples=4)
@given(st.data())
def test_any_legal_scheme_obeys_the_law(law: str, data: Any) -> None:
    scheme = data.draw(asked_of(law))
    shape = data.draw(shapes(scheme, widest=96))
    LAWS[law](data.draw(cases(scheme, shape, "triton", kinds=LAWS[law].kinds, batch=2)))
