"""Bands, and polar coordinates of several levels: by hand, their tables, what is refused, planes for every shape."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from kvdsl import cost, reference
from kvdsl.codegen.layout import lay_out
from kvdsl.codegen.plan import plan_for
from kvdsl.codegen.render_triton import render
from kvdsl.codegen.triton_bands import lanes
from kvdsl.errors import SchemeError
from kvdsl.levels import angles
from kvdsl.rules import shape_faults
from kvdsl.scheme import (
    Bands,
    Codebook,
    Float,
    Polar,
    Recent,
    Rotate,
    Scale,
    Scheme,
    Sketch,
    Store,
    Uniform,
    per_channel,
    per_token,
)
from kvdsl.schemes import polar
from kvdsl.shape import Shape

RADII, ANGLES = Store(Float("fp16")), Store(Codebook(2, "angle"))


def exact(levels: int) -> Store:
    """Radii and angles of so many levels, in float32."""
    return Store(Bands((levels + 1) * (Store(Float("fp32")),)), transform=Polar(levels))


def test_two_levels_by_hand() -> None:
    """(3, 0), (4, 12) pair up to (5, 12) at atan(4/3) and a quarter of a turn, and those to 13 at atan(12/5)."""
    y = reference.encoded_rows(exact(2), torch.tensor([3.0, 0, 4, 12]).reshape(1, 1, 1, 4))
    assert y.flatten().tolist() == pytest.approx([13, math.atan2(4, 3), math.pi / 2, math.atan2(12, 5)], rel=2**-23)
    back = reference.quantize(exact(2), torch.tensor([3.0, 0, 4, 12]).reshape(1, 1, 1, 4)).decoded
    assert back.flatten().tolist() == pytest.approx([3, 0, 4, 12], abs=2e-6)


@pytest.mark.parametrize("levels", [1, 2, 3, 4, 5])
def test_p24_radii_and_angles_give_the_vector_back(levels: int) -> None:
    """P24: the squared radius is the block's sum of squares, angles behind the first level lie in a quarter turn, and
    in float32 the vector comes back within 2^-20 of the block's radius a level."""
    x = torch.randn(1, 2, 20, 64, generator=torch.Generator().manual_seed(levels)) * 7
    y = reference.encoded_rows(exact(levels), x).double()
    count = 64 >> levels
    block = x.double().unflatten(-1, (-1, count)).square().sum(-2)
    assert torch.allclose(y[..., :count].square(), block, rtol=2**-22)
    assert bool((y[..., count + 32 :] <= math.pi / 2 + 1e-6).all()) and bool((y >= 0).all())
    off = (reference.quantize(exact(levels), x).decoded - x).abs().unflatten(-1, (-1, count))
    assert bool((off <= levels * block.sqrt()[..., None, :] * 2.0**-20).all())


@pytest.mark.parametrize("channels", [4, 8, 16, 32])
@pytest.mark.parametrize("bits", [1, 2, 3])
def test_p13_a_table_of_angles_is_the_best_one(bits: int, channels: int) -> None:
    """P13, for the density of sin(2a)^(channels/2 - 1): every level is the mean of its cell, by another integration."""
    table = np.array(angles(2**bits, channels))
    borders = [0.0, *(table[1:] + table[:-1]) / 2, math.pi / 2]
    for level, low, high in zip(table, borders, borders[1:], strict=False):
        a = low + (np.arange(100_000) + 0.5) * (high - low) / 100_000
        density = np.sin(2 * a) ** (channels // 2 - 1)
        assert level == pytest.approx((a * density).sum() / density.sum(), abs=1e-8)
    assert np.allclose(table + table[::-1], math.pi / 2, atol=1e-14)


def test_the_first_level_is_the_circle_in_equal_cells() -> None:
    assert angles(4, 2) == pytest.approx([math.pi * odd / 4 for odd in (1, 3, 5, 7)])


def test_bits_are_the_papers() -> None:
    """16 + 32 + 8 + 4 + 2 = 62 bits for 16 channels, and the page holds no more."""
    assert cost.bits(polar).mean == 62 / 16
    layout = lay_out(polar, Shape(128, 8))
    assert 8 * layout.head_bytes == 2 * 128 * layout.page_tokens * 62 / 16


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 112, 128, 192, 256])
def test_planes_fit_every_band(head_dim: int, levels: int) -> None:
    """The planes that attention reads are a divisor or a multiple of every band, and all of them make up the vector."""
    store = Store(Bands((RADII, *levels * (Store(Codebook(4, "angle")),))), transform=Polar(levels))
    scheme, shape = Scheme(both=store), Shape(head_dim, 1)
    if shape_faults(scheme, shape):
        assert head_dim % 64
        return
    plan = plan_for(scheme, shape)
    width = lanes(plan.keys)
    counts = [term.dim for term in plan.keys.terms]
    assert sum(counts) == head_dim and head_dim % width == 0
    assert all(count % width == 0 or width % count == 0 for count in counts)
    text = render(plan, "radii and angles")
    made = {name for j in range(head_dim // width) for name in (f"tl.dot(n{j}.to(tl.float16), e{j}",)}
    assert all(name in text for name in made)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no polar coordinates": ({"code": Bands((RADII, ANGLES))}, "keys.code: nothing says where one stretch"),
    "too few": ({"code": Bands((RADII, ANGLES)), "transform": Polar(2)}, "give 3, that of the radii first"),
    "one code for several levels": (
        {"code": Uniform(4), "scale": per_channel(tokens=32), "transform": Polar(2)},
        "keys.transform[0].levels: radii and angles of 2 levels are too unlike for one code",
    ),
    "a scale outside": (
        {"code": Bands((RADII, ANGLES)), "scale": per_token(channels=8), "transform": Polar()},
        "keys.scale: each stretch has a scale of its own",
    ),
    "a residual": (
        {"code": Bands((RADII, ANGLES)), "residual": Sketch(64), "transform": Polar()},
        "keys.residual: what stretches leave is not coded",
    ),
    "bands of what is left": (
        {
            "code": Uniform(2),
            "scale": per_token(),
            "residual": Store(Bands((RADII, ANGLES)), transform=Polar()),
        },
        "keys.residual.code: what is left of a vector is coded as a whole",
    ),
    "a sketch": (
        {"code": Bands((Store(Sketch(8)), ANGLES)), "transform": Polar()},
        "keys.code.stores[0].code: Sketch is of a whole vector",
    ),
    "a map inside": (
        {"code": Bands((Store(Float("fp16"), transform=Rotate()), ANGLES)), "transform": Polar()},
        "keys.code.stores[0].transform: a stretch is coded as it is",
    ),
    "trits": (
        {"code": Bands((RADII, Store(Uniform(levels=3), scale=per_token()))), "transform": Polar()},
        "keys.code.stores[1].code.bits: five ternary digits",
    ),
    "a calibrated scale": (
        {"code": Bands((Store(Uniform(8), scale=Scale(when="calibrated")), ANGLES)), "transform": Polar()},
        "keys.code.stores[0].scale.when: stretches are not calibrated",
    ),
    "angles under a scale": (
        {"code": Bands((RADII, Store(Codebook(4, "angle"), scale=per_token()))), "transform": Polar()},
        "keys.code.stores[1].scale: the law of angles gives them in radians",
    ),
    "angles of no circle": ({"code": Codebook(4, "angle")}, "keys.code.levels: no angles are coded here"),
    "no store": ({"code": Bands((RADII, Codebook(4))), "transform": Polar()}, "keys.code.stores[1]"),  # type: ignore[arg-type]
    "too deep": ({"code": Bands((RADII, ANGLES)), "transform": Polar(9)}, "9 levels are more than 5; use 5"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_bands_may_not_be(name: str) -> None:
    fields, told = REFUSED[name]
    with pytest.raises(SchemeError) as refusal:
        Scheme(keys=Store(**fields), values=Store(), recent=Recent(32))
    assert told in str(refusal.value)


@pytest.mark.parametrize(
    ("head_dim", "told"),
    [(72, "transform[1].levels: blocks of 16 channels do not divide head_dim 72; use 3"), (96, "fill no whole bytes")],
)
def test_what_shows_at_a_shape(head_dim: int, told: str) -> None:
    assert any(told in str(fault) for fault in shape_faults(polar, Shape(head_dim, 1)))


def test_a_spec_of_bands_comes_back_from_every_text() -> None:
    """repr, TOML and JSON; a field that only the inner stores have goes down to them."""
    names = {"Bands": Bands, "Store": Store, "Float": Float, "Codebook": Codebook, "Polar": Polar, "Rotate": Rotate}
    assert eval(repr(polar), {"Scheme": Scheme, **names}) == polar
    assert Scheme.from_toml(polar.to_toml()) == polar == Scheme.from_json(polar.to_json())
    fine = polar.with_(bits=3)
    assert [getattr(one.code, "bits", None) for one in fine.keys.code.stores] == [None, 3, 3, 3, 3]  # type: ignore[union-attr]
