"""Polar coordinates in Triton's interpreter: cosine and sine as kernels take them, and laws of compositions."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from kvdsl.codegen.device import cartesian
from kvdsl.scheme import ChannelShift, Codebook, Float, Polar, Recent, Rotate, Scheme, Store, Uniform, per_channel
from kvdsl.scheme import per_token as scaled
from kvdsl.shape import Shape
from kvdsl.testing import LAWS, Case


@triton.jit  # type: ignore[untyped-decorator]
def both(radius_ptr, angle_ptr, out_ptr, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, COUNT)
    x, y = cartesian(tl.load(radius_ptr + i), tl.load(angle_ptr + i))
    tl.store(out_ptr + i, x)
    tl.store(out_ptr + COUNT + i, y)


@pytest.mark.parametrize("turns", [1, 20, 160])
def test_cosine_and_sine(turns: int) -> None:
    """Within 2**-22 of the radius, up to 2**10; exact at 0."""
    count = 1 << 14
    generator = torch.Generator().manual_seed(turns)
    radius = torch.rand(count, generator=generator) * 100
    angle = (torch.rand(count, generator=generator) * 2 - 1) * (6.2831855 * turns)
    angle[:6] = torch.tensor([0, 1.5707964, 3.1415927, 4.712389, 6.2831855, -1e-30])
    out = torch.empty(2, count)
    both[(1,)](radius, angle, out, count)
    right = torch.stack([radius.double() * angle.double().cos(), radius.double() * angle.double().sin()])
    assert bool(((out - right).abs() <= radius * 2.0**-22).all())
    assert out[0, 0] == radius[0] and out[1, 0] == 0


SCHEMES = {
    "rotated": Scheme(
        both=Store(Uniform(4), scale=per_channel(tokens=32), transform=(Rotate("orthogonal", seed=0), Polar())),
        recent=Recent(32),
    ),
    "shifted": Scheme(
        keys=Store(Float("fp16"), transform=Polar()),
        values=Store(Codebook(3), scale=scaled(channels=16), transform=(ChannelShift(), Polar())),
    ),
}


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("law", ["decoding_equals_the_reference", "decode_is_attention", "scores_are_products"])
def test_a_composition_obeys_the_law(name: str, law: str) -> None:
    LAWS[law](Case(SCHEMES[name], Shape(32, 1, 2), "triton", batch=2, tokens=100, seed=1))
