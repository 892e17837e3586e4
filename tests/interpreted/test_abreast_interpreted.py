"""Two tokens abreast in decode, in Triton's interpreter: what `extend` of the same query finds, token by token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvdsl.codegen.plan import plan_for
from kvdsl.schemes import ALL
from kvdsl.shape import Shape
from kvdsl.testing import Case
from kvdsl.testing.attention import attend, require_close, step_of


@pytest.mark.parametrize("louder", [0, 1])
@pytest.mark.parametrize("name", ["token2", "token3", "kivi2", "kvtq_2bit", "quarot2", "q5_1"])
def test_both_tokens_weigh_what_they_should(name: str, louder: int) -> None:
    """Also where all that one of the two sub-tiles holds weighs next to nothing: they have maxima of their own."""
    one = Case(ALL[name], Shape(128, 1, 4 if louder else 2), "triton", batch=2, tokens=300, seed=3)
    plan = plan_for(one.scheme, one.shape).of_decode
    assert plan.abreast
    step = step_of(one, 1, ragged=False)
    sub_tile = torch.arange(300) // plan.half % 2
    loud = torch.where(sub_tile == louder, 6.0, 0.05)[:, None].to(step.k.dtype)
    step = replace(step, k=step.k * loud)
    require_close(one, step, attend(one, step, splits=2, form="decode"))
    for found, right in zip(attend(one, step, form="decode"), attend(one, step, form="extend"), strict=True):
        assert torch.allclose(found, right, atol=4e-3)
