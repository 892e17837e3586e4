"""Linear maps of keys behind PreRope: they are of keys before RoPE, and are undone in the loop over tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from law_cases import holds

from kvdsl import calibrate, reference, roundtrip
from kvdsl.codegen.plan import plan_for
from kvdsl.errors import SchemeError, ShapeError
from kvdsl.params import ROPE, checked
from kvdsl.rope import turned, usual
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
from kvdsl.shape import Shape

BITS = Uniform(4)
VALUES = Store(Uniform(4), scale=per_token(), transform=Rotate("random_hadamard", size=8, seed=3))


def scheme(*parts: Any, code: Any = BITS, scale: Any = None, interleaved: bool = False, **more: Any) -> Scheme:
    keys = Store(code, scale=scale or per_token(), transform=(PreRope(interleaved), *parts))
    return Scheme(keys=keys, values=VALUES, **more)


SCHEMES = {
    "hadamard": scheme(Rotate("hadamard", size=32)),
    "signs": scheme(Rotate("random_hadamard", size=16, seed=1), code=Uniform(2), interleaved=True),
    "drawn": scheme(Rotate("orthogonal", size=8, seed=0), code=Codebook(3)),
    "chain": scheme(ChannelShift(), ChannelScale(), Permute(), Rotate("hadamard", size=8)),
    "channels": scheme(Rotate("hadamard", size=8), scale=per_channel(tokens=32), recent=Recent(64)),
    "digits": scheme(Rotate("hadamard", size=32), code=Uniform(levels=3), scale=per_token(channels=32)),
    "digits alone": scheme(code=Uniform(levels=3), scale=per_token(channels=32)),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_every_law_holds(name: str) -> None:
    assert holds(SCHEMES[name], "torch", examples=2) > 30


def test_what_is_coded_is_the_map_of_the_key_before_its_position() -> None:
    before = torch.randn(1, 2, 70, 64, generator=torch.Generator().manual_seed(0))
    k = turned(before, usual(64), torch.arange(70), False).float()
    right = reference.encoded_rows(Store(Float("fp32"), transform=Rotate()), before)
    store = Store(Float("fp32"), transform=(PreRope(), Rotate()))
    assert torch.allclose(reference.encoded_rows(store, k, {ROPE: usual(64)}), right, atol=2e-6)
    own = Scheme(keys=store.with_(code=Uniform(4), scale=per_token()), values=VALUES)
    k_hat, _ = roundtrip(own, k, k, window=False, params={ROPE: usual(64)})
    bare = Scheme(keys=Store(Uniform(4), scale=per_token(), transform=Rotate()), values=VALUES)
    y_hat, _ = roundtrip(bare, before, before, window=False)
    near = turned(y_hat, usual(64), torch.arange(70), False)
    assert (k_hat - near).norm() < 0.01 * near.norm()  # a few codes flip at ties


def test_data_are_measured_before_positions() -> None:
    """Shifts, learned scales and orders behind PreRope are those of the keys before RoPE."""
    generator = torch.Generator().manual_seed(1)
    before = torch.randn(1, 2, 64, 32, generator=generator) * torch.rand(32, generator=generator) + 3
    k = turned(before, usual(32), torch.arange(64), False).float()
    parts = (ChannelShift("mean"), ChannelScale("learned"), Permute("range"))
    own, bare = scheme(*parts), Scheme(keys=Store(Uniform(4), scale=per_token(), transform=parts), values=VALUES)
    got, right = calibrate(own, k, k, params={ROPE: usual(32)}), calibrate(bare, before, before)
    assert torch.equal(got[ROPE], usual(32))
    for i in (0, 1):
        assert torch.allclose(got[f"keys.transform[{i + 1}]"], right[f"keys.transform[{i}]"], rtol=1e-4)
    assert (got["keys.transform[3]"] == right["keys.transform[2]"]).double().mean() > 0.9


@pytest.mark.parametrize("name", ["hadamard", "signs", "chain"])
def test_two_factors_are_the_map(name: str) -> None:
    """W[d, i] = outer[d] * inner[i, d]; of a Hadamard matrix exactly, in float16."""
    shape, own = Shape(64, 2, 2), SCHEMES[name]
    generator = torch.Generator().manual_seed(2)
    k = torch.randn(1, 2, 64, 64, generator=generator) * torch.rand(64, generator=generator)
    made = checked(own, shape, calibrate(own, k, k, params={ROPE: usual(64)}))
    inner, outer, decode = (made[f"keys.{part}"] for part in ("inner", "outer", "decode"))
    assert inner.dtype is torch.float16
    got = inner.mT.double() * outer[..., None].double()
    tolerance = 0.0 if name != "chain" else 2.0**-11
    assert torch.allclose(got, decode.double(), rtol=2.0**-23 + tolerance, atol=0)
    assert bool((plan_for(own, shape).keys.butterflies > 0) == (name != "chain"))
    exact = checked(own, Shape(64, 2, 2, "fp32"), calibrate(own, k, k, params={ROPE: usual(64)}))
    assert exact["keys.inner"].dtype is torch.float32


def test_another_matrix_is_refused_where_kernels_know_theirs() -> None:
    eye, shape = torch.eye(64)[None], Shape(64, 2, 2)
    given = {ROPE: usual(64), "keys.encode": eye, "keys.decode": eye}
    with pytest.raises(ShapeError, match=r"'keys.decode'\]?: another matrix than .*Rotate.*; leave it out, or use"):
        checked(SCHEMES["hadamard"], shape, given)
    with pytest.raises(ShapeError, match=r"'values.decode'\]?: another matrix than .*Rotate.*; leave it out, or use"):
        checked(SCHEMES["hadamard"], shape, {ROPE: usual(64), "values.encode": eye, "values.decode": eye})
    assert torch.equal(checked(SCHEMES["drawn"], shape, given)["keys.inner"][0], eye[0].half())


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (
            (ChannelScale("balance"),),
            r"keys.transform\[1\].by: 'balance' weighs .*; behind PreRope\(\) use 'sqrt_absmax'",
        ),
        (
            (Rotate(), PreRope()),
            r"keys.transform\[2\]: RoPE comes off before anything else; put PreRope\(\) first, once",
        ),
        ((Rotate(), Polar()), r"keys.transform\[2\]: RoPE turns the angles of pairs .*; leave out PreRope\(\)"),
    ],
    ids=["balance", "twice", "polar"],
)
def test_what_is_refused(parts: Any, words: str) -> None:
    with pytest.raises(SchemeError, match=words):
        scheme(*parts, scale=per_token(channels=8))
