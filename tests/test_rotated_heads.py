"""Rotations over several heads: their rules, their meaning, and that both backends read what they stored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from law_cases import SEVERAL_HEADS, holds

import kvdsl
from kvdsl import calibrate, reference
from kvdsl.codegen.plan import plan_for
from kvdsl.codegen.show import View, show
from kvdsl.errors import SchemeError, ShapeError
from kvdsl.matrices import rotation
from kvdsl.params import ROPE, checked
from kvdsl.rope import usual
from kvdsl.scheme import (
    ChannelScale,
    ChannelShift,
    Codebook,
    Float,
    Permute,
    Polar,
    PreRope,
    Recent,
    Rotate,
    Scheme,
    Store,
    Uniform,
    per_channel,
    per_token,
)
from kvdsl.schemes import rotatekv
from kvdsl.shape import Shape

EXACT = Float("fp32")
BITS = Uniform(4)
POINT = per_token(zero="point")


def both(*parts: Any, **more: Any) -> Scheme:
    return Scheme(both=Store(BITS, scale=per_token(), transform=parts), **more)


SCHEMES = {
    "in the loop and per output": SEVERAL_HEADS,
    "on the query": Scheme(
        keys=Store(BITS, scale=POINT, transform=Rotate(heads=2)),
        values=Store(Uniform(3), scale=per_channel(tokens=32)),
        recent=Recent(32),
    ),
    "a chain, and of what is left": Scheme(
        both=Store(
            Uniform(3),
            scale=per_channel(tokens=32),
            transform=(ChannelShift(), Rotate("random_hadamard", heads=2, seed=1), ChannelScale(), Permute()),
            residual=Store(Uniform(2), scale=per_token(channels=32), transform=Rotate(heads=2)),
        ),
        recent=Recent(64),
    ),
    "drawn, before RoPE": Scheme(
        keys=Store(
            Codebook(3),
            scale=per_token(),
            transform=(PreRope(), ChannelShift(), Rotate("orthogonal", heads=2, seed=3)),
        ),
        values=Store(Float("fp16"), transform=Rotate(heads=2)),
    ),
    "polar": Scheme(
        both=Store(BITS, scale=per_channel(tokens=32), transform=(Rotate(heads=2), Polar())), recent=Recent(32)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEMES)
def test_every_law_holds(name: str) -> None:
    assert holds(SCHEMES[name], "torch", examples=1) > 15


@pytest.mark.parametrize(("kind", "seed"), [("hadamard", None), ("random_hadamard", 3), ("orthogonal", 0)])
def test_it_is_one_rotation_of_all_their_channels(kind: Any, seed: int | None) -> None:
    """Four heads of 128 channels, each number one sum of 512; what is read is the vector again."""
    x = torch.randn(1, 8, 5, 128, generator=torch.Generator().manual_seed(0))
    store = Store(EXACT, transform=Rotate(kind, heads=4, seed=seed))
    got, matrix = reference.encoded_rows(store, x).double(), rotation(kind, 512, seed)
    for first in (0, 4):
        for t in range(5):
            whole = torch.cat([x[0, first + i, t].double() for i in range(4)])
            assert torch.allclose((matrix @ whole).reshape(4, 128), got[0, first : first + 4, t], rtol=0, atol=2.0**-21)
    assert torch.allclose(reference.quantize(store, x).decoded, x.double(), rtol=0, atol=2.0**-20)


def test_an_outlier_of_one_head_is_shared_by_all() -> None:
    """A channel of size 100 among four heads: its scale is halved, and the error of all four with it."""
    x = torch.randn(1, 4, 64, 128, generator=torch.Generator().manual_seed(1))
    x[:, 1, :, 7] += 100

    def error(heads: int) -> float:
        store = Store(BITS, scale=POINT, transform=Rotate(heads=heads))
        return float((reference.quantize(store, x).decoded - x)[:, 1].norm() / x[:, 1].norm())

    assert error(4) < 0.75 * error(1)


def test_a_nan_spoils_its_token_in_every_head_of_its_own() -> None:
    x = torch.ones(1, 4, 3, 32)
    x[0, 1, 1, 5] = torch.nan
    y = reference.encoded_rows(Store(EXACT, transform=Rotate(heads=2)), x)
    assert y.isnan().all(-1)[0].tolist() == [[False, True, False]] * 2 + [[False] * 3] * 2
    assert not bool(y[:, 2:].isnan().any() or y[:, :, ::2].isnan().any())


def test_data_are_measured_on_what_is_coded() -> None:
    """Queries of all heads meet the numbers of each: what balances them sees all."""
    generator = torch.Generator().manual_seed(2)
    k, q = torch.randn(1, 2, 64, 32, generator=generator), torch.randn(1, 4, 8, 32, generator=generator)
    store = Store(BITS, scale=per_token(), transform=(Rotate(heads=2), ChannelScale("balance")))
    found = calibrate(Scheme(keys=store, values=Store()), k, k, q)["keys.transform[1]"]
    matrix = rotation("hadamard", 64)
    whole = torch.cat((k[:, 0], k[:, 1]), -1).double() @ matrix.T
    met = [torch.nn.functional.pad(q[:, h].double(), (0, 32) if h < 2 else (32, 0)) @ matrix.T for h in range(4)]
    right = (whole.abs().amax((0, 1)) / torch.stack(met).abs().amax((0, 1, 2))).sqrt().reshape(2, 32)
    assert torch.allclose(found.double(), right, rtol=1e-5)


def test_two_factors_are_the_map() -> None:
    """Behind RoPE: W[d, m] = outer[d] * inner[m, d], m a number of any of the four heads, exactly."""
    scheme, shape = rotatekv.rotatekv4_grouped, Shape(64, 8, 8)
    made = checked(scheme, shape, {ROPE: usual(64)})
    inner, outer, decode = (made[f"keys.{part}"] for part in ("inner", "outer", "decode"))
    assert inner.dtype is torch.float16 and tuple(inner.shape) == (8, 256, 64) and tuple(decode.shape) == (8, 64, 256)
    assert torch.equal(inner.mT.float() * outer[..., None], decode)
    assert torch.equal(decode[:4].flatten(0, 1).double(), rotation("hadamard", 256).float().double().T)
    assert plan_for(scheme, shape).keys.butterflies == 64


def test_a_head_is_read_from_the_codes_of_all() -> None:
    """Four heads at once, before RoPE: what attention finds is what the reference holds."""
    scheme = rotatekv.rotatekv4_grouped
    generator = torch.Generator().manual_seed(3)
    k, v, q = (torch.randn(1, heads, 40, 32, generator=generator) for heads in (4, 4, 8))
    params = {ROPE: usual(32)}
    out, _ = kvdsl.attend(scheme, q[:, :, -1:], k, v, backend="torch", params=params)
    right, _ = reference.attend(scheme, q[:, :, -1:], k, v, params=params)
    assert torch.allclose(out.double(), right, rtol=0, atol=1e-5)


def test_what_it_costs_is_told() -> None:
    """The bits are those of one head at a time; a step reads the keys of four heads for each."""
    told, lines = show(View("grouped", rotatekv.rotatekv4_grouped, Shape(128, 8, 32)), "cost")
    alone, others = show(View("alone", rotatekv.rotatekv4, Shape(128, 8, 32)), "cost")
    stored = told["bytes_per_token_and_layer"]
    assert told["mean"] == alone["mean"] and stored == alone["bytes_per_token_and_layer"]
    assert told["read_bytes_per_token_and_layer"] == 2.5 * stored and alone["read_bytes_per_token_and_layer"] == stored
    assert told["keys"]["multiplications"]["decoding"] == 1.75 and alone["keys"]["multiplications"]["decoding"] == 1
    assert any(line.startswith("bytes read a token") and "4 heads of the keys" in line for line in lines)
    assert not any(line.startswith("bytes read a token") for line in others)
    _, algebra = show(View("grouped", rotatekv.rotatekv4_grouped, Shape(128, 8, 32)), "normal-form")
    assert any("R hadamard over 4 neighbouring heads" in line for line in algebra)


def test_texts_say_it_and_read_it_back() -> None:
    scheme = both(Rotate("random_hadamard", heads=2, seed=1))
    assert "Rotate('random_hadamard', heads=2, seed=1)" in repr(scheme)
    for read, text in ((Scheme.from_toml, scheme.to_toml()), (Scheme.from_json, scheme.to_json())):
        assert "heads" in text and read(text) == scheme
    assert scheme.hash != both(Rotate("random_hadamard", seed=1)).hash
    assert both(Rotate(heads=1)).hash == both(Rotate()).hash


@pytest.mark.parametrize(
    ("rotate", "words"),
    [
        ({"heads": 0}, r"transform\[0\].heads: 0 kv heads are fewer than 1; use an int from 1 to 16"),
        ({"heads": 2, "size": 64}, r"transform\[0\].size: 2 heads are rotated as one vector, .*; leave size out, or"),
        ({"heads": True}, r"transform\[0\].heads: True is no number of kv heads; use an int from 1 to 16"),
    ],
    ids=["none", "blocks", "bool"],
)
def test_what_is_refused(rotate: dict[str, Any], words: str) -> None:
    with pytest.raises(SchemeError, match=words):
        both(Rotate(**rotate))


@pytest.mark.parametrize(
    ("rotate", "shape", "words"),
    [
        (Rotate(heads=4), Shape(64, 3, 9), r"transform\[0\].heads: 4 heads do not divide 3 kv heads; leave heads out"),
        (Rotate(heads=4), Shape(64, 6), r"transform\[0\].heads: 4 heads do not divide 6 kv heads; use heads=2"),
        (
            Rotate(heads=6),
            Shape(64, 6),
            r"heads: .* power of two, 6 heads of 64 .* are none; use heads=2 or kind=",
        ),
        (Rotate(heads=2), Shape(96, 2), r"\[0\]: .* power of two, 2 heads of 96 .* are none; use kind='orthogonal'"),
    ],
    ids=["odd", "other", "no power", "no power of channels"],
)
def test_what_does_not_fit(rotate: Rotate, shape: Shape, words: str) -> None:
    with pytest.raises(SchemeError, match=words):
        plan_for(both(rotate), shape)
    plan_for(both(Rotate("orthogonal", heads=shape.kv_heads, seed=0)), shape)


def test_given_maps_are_of_all_heads() -> None:
    scheme, shape = both(Rotate(heads=2)), Shape(32, 4)
    eye = torch.eye(64).reshape(2, 32, 64).repeat(2, 1, 1)
    made = checked(scheme, shape, {"keys.encode": eye, "keys.decode": eye})
    assert torch.equal(made["keys.decode"], eye)
    with pytest.raises(ShapeError, match=r"'keys.encode'\]: shape \(1, 32, 64\); the right one is \(4, 32, 64\)$"):
        checked(scheme, shape, {"keys.encode": eye[:1], "keys.decode": eye[:1]})
    with pytest.raises(ShapeError, match=r"keys: 3 heads are no whole number of 2, which are rotated .*; give a"):
        reference.quantize(Store(EXACT, transform=Rotate(heads=2)), torch.ones(1, 3, 1, 32))
