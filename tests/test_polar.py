"""Polar coordinates: the definition by hand, on either side of angle 0, what is refused of them, their proof."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from kvdsl import reference
from kvdsl.codegen.absorb import absorb
from kvdsl.codegen.layout import lay_out
from kvdsl.errors import SchemeError
from kvdsl.rules import shape_faults
from kvdsl.scheme import (
    ALL,
    Block,
    ChannelScale,
    Codebook,
    Float,
    Polar,
    PreRope,
    Recent,
    Rotate,
    Scale,
    Scheme,
    Store,
    Transform,
    Uniform,
    per_channel,
    per_tensor,
    per_token,
)
from kvdsl.schemes import polar_pairs
from kvdsl.shape import Shape
from kvdsl.testing.bounds import bound

EXACT = Store(Float("fp32"), transform=Polar())
CELLS = Store(Uniform(4, grid="cells"), scale=per_channel(tokens=2, dtype="fp32"), transform=Polar())


def vector(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float32).reshape(1, 1, 1, -1)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_radius_and_angle_by_hand() -> None:
    """Channels i and i + 4/2: (3, 4) at atan(4/3), (0, -2) at three quarters of a turn; zeros at angle 0."""
    y = reference.encoded_rows(EXACT, vector(3, 0, 4, -2))
    assert y.dtype is torch.float32
    assert y.flatten().tolist() == pytest.approx([5, 2, math.atan2(4, 3), 1.5 * math.pi], rel=2**-24)
    assert reference.encoded_rows(EXACT, vector(-0.0, 0, -0.0, -0.0)).tolist() == [[[[0, 0, 0, 0]]]]
    assert reference.quantize(EXACT, vector(3, 0, 4, -2)).decoded.flatten().tolist() == pytest.approx(
        [3, 0, 4, -2], abs=1e-6
    )


def test_p24_exact_numbers_come_back() -> None:
    """P24: the squared radius is the sum of squares, and float32 radii and angles give the vector back."""
    x = normal(2, 2, 40, 32) * 100
    y = reference.encoded_rows(EXACT, x).double()
    radius, angle = y.chunk(2, -1)
    assert torch.allclose(radius.square(), x.double().unflatten(-1, (2, -1)).square().sum(-2), rtol=2**-22)
    assert bool((angle >= 0).all()) and float(angle.max()) <= float(torch.tensor(2 * math.pi))
    assert float((angle > math.pi).double().mean()) == pytest.approx(0.5, abs=0.1)
    off = (reference.quantize(EXACT, x).decoded - x).abs()
    assert bool((off <= radius.repeat(1, 1, 1, 2) * 2.0**-21).all())


def test_p24_a_turn_further_is_the_same_number() -> None:
    """P24: an angle and a whole turn more decode to the same vector, so that the side of 0 it lies on is no matter."""
    from kvdsl.reference.spaces import cartesian

    y = torch.rand(1, 1, 50, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    further = y.clone()
    further[..., 4:] += 2 * math.pi
    assert torch.allclose(cartesian(EXACT, y), cartesian(EXACT, further), rtol=0, atol=2**-23)


def test_a_group_on_both_sides_of_zero() -> None:
    """Angles a hair below and above 0 lie a turn apart: the group takes the whole circle, in 16 cells of which these
    are the last and the first, pi/16 wide on either side of their middle."""
    x = torch.tensor([[1.0, 1e-3], [1.0, -1e-3]]).reshape(1, 1, 2, 2)
    got = reference.quantize(CELLS, x)
    assert got.codes is not None and got.codes[0, 0, :, 1].tolist() == [0, 15]
    assert float((got.decoded - x).abs().max()) <= math.pi / 16
    assert bool(((got.decoded - x).abs() <= bound(CELLS, x)).all())


def test_codes_by_hand() -> None:
    """Radii 1 and 3, angles 0 and a quarter turn: steps 1/8 and pi/32, codes 0 and 15, numbers in the cells' middle."""
    got = reference.quantize(CELLS, torch.tensor([[1.0, 0.0], [0.0, 3.0]]).reshape(1, 1, 2, 2))
    assert got.codes is not None and got.codes.flatten().tolist() == [0, 0, 15, 15]
    assert got.coded.flatten().tolist() == pytest.approx(
        [1 + 1 / 16, math.pi / 64, 3 - 1 / 16, math.pi / 2 - math.pi / 64], rel=1e-6
    )
    r, a = got.coded[0, 0, 1].tolist()
    assert got.decoded[0, 0, 1].tolist() == pytest.approx([r * math.cos(a), r * math.sin(a)], rel=1e-6)


def test_a_nan_spoils_its_vector_and_large_numbers_saturate() -> None:
    x = vector(1, math.nan, 2, 3)
    assert bool(reference.encoded_rows(EXACT, x).isnan().all()) and bool(
        reference.quantize(EXACT, x).decoded.isnan().all()
    )
    y = reference.encoded_rows(EXACT, vector(math.inf, -math.inf))
    assert y.flatten().tolist() == pytest.approx([65504 * math.sqrt(2), 1.75 * math.pi])


def test_maps_come_before_it() -> None:
    """A rotation first: radii and angles are those of the rotated vector, and it is rotated back in the end."""
    chain = (Rotate("orthogonal", seed=3), Polar())
    store, x = Store(Float("fp32"), transform=chain), normal(1, 1, 6, 32)
    rotated = reference.encoded_rows(Store(Float("fp32"), transform=chain[0]), x)
    assert torch.equal(reference.encoded_rows(store, x), reference.encoded_rows(EXACT, rotated))
    assert torch.allclose(reference.quantize(store, x).decoded, x.double(), atol=1e-5)


@pytest.mark.parametrize("code", [Float("fp16"), Float("fp32"), Float("e4m3"), Uniform(8), Uniform(3), Uniform(1)])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 128])
def test_a_plane_is_of_radii_or_of_angles(code: Float | Uniform, head_dim: int) -> None:
    """So that radius and angle of a pair stand in the same lane of two planes, half of all planes apart."""
    scale = per_token(8) if isinstance(code, Uniform) else None
    layout = lay_out(Scheme(both=Store(code, scale=scale, transform=Polar())), Shape(head_dim, 1)).keys
    half, planes = head_dim // 2, layout.planes
    assert planes % 2 == 0
    for j in range(planes // 2):
        radii, angles = layout.spans[j].channels, layout.spans[j + planes // 2].channels
        assert [channel + half for channel in radii] == list(angles)


def keys(scale: Scale | None, *transform: Transform, code: object = None) -> Scheme:
    store = Store(code or Uniform(4), scale=scale, transform=transform)  # type: ignore[arg-type]
    return Scheme(keys=store, values=Store(), recent=Recent(128, "whole"))


BLOCKS = per_channel(tokens=128)
FAULTY: list[tuple[Callable[[], Scheme], str]] = [
    (
        lambda: keys(BLOCKS, Polar(), Rotate()),
        "keys.transform[0]: behind polar coordinates there is no vector that could be mapped; put Polar() last, once",
    ),
    (
        lambda: keys(BLOCKS, PreRope(), Polar()),
        "keys.transform[1]: RoPE turns the angles of pairs and leaves their radii: without it nothing is easier to "
        "code; leave out PreRope()",
    ),
    (
        lambda: keys(per_token(), Polar()),
        "keys.scale.block.channels: one scale over all channels is one of radii and of angles, which have no unit in "
        "common; use per_channel(tokens=128), or 32 channels for each scale",
    ),
    (
        lambda: keys(BLOCKS.with_(scale=per_tensor(dtype="fp32", when="calibrated")), Polar()),
        "keys.scale.scale: a second level is one unit for the scales of radii and of angles, which have none in "
        "common; leave it out, and use dtype='fp16'",
    ),
    (
        lambda: keys(BLOCKS, Polar(), code=Codebook(levels=(-1, 0, 1))),
        "keys.code.bits: five ternary digits a byte would mix radii and angles; use bits=2",
    ),
]


@pytest.mark.parametrize(("make", "told"), FAULTY)
def test_it_is_refused_in_these_words(make: Callable[[], Scheme], told: str) -> None:
    with pytest.raises(SchemeError) as refusal:
        make()
    assert told in str(refusal.value)


def test_groups_divide_the_radii() -> None:
    scheme = keys(per_token(channels=32), Polar())
    assert shape_faults(scheme, Shape(64, 1)) == ()
    told = [str(fault) for fault in shape_faults(scheme, Shape(96, 1))]
    assert told == [
        "keys.scale.block.channels: groups of 32 channels do not divide the 48 radii of head_dim 96; use 16"
    ]
    scheme = keys(Scale(Block(ALL, 1), range="absmax", when="calibrated"), Polar())
    assert shape_faults(scheme, Shape(96, 1)) == ()


def test_a_sum_over_pairs_is_proven() -> None:
    told = absorb("keys", polar_pairs.keys, "k")
    assert told is not None and told.statement == (
        "sum_d q[d]*k[t, d] = sum_i r[t, i]*(q[i]*cos a[t, i] + q[i + D/2]*sin a[t, i])"
    )
    behind = absorb("values", Store(Float("fp16"), transform=(Rotate(), Polar())), "v")
    assert behind is not None and behind.steps[0].startswith("y = R x") and "W is applied to the output" in behind.where
    assert "y[t, i] = r[t, i]*cos a[t, i]" in behind.read


@pytest.mark.parametrize("chain", [(Polar(),), (ChannelScale(), Rotate("orthogonal", seed=1), Polar())])
def test_texts_give_it_back(chain: tuple[Transform, ...]) -> None:
    scheme = keys(BLOCKS, *chain)
    assert Scheme.from_json(scheme.to_json()) == Scheme.from_toml(scheme.to_toml()) == scheme
    assert Scheme.from_dict(scheme.to_dict()) == eval(repr(scheme)) == scheme
    assert scheme.hash != keys(BLOCKS, *chain[:-1]).hash
