"""Linear maps of keys behind PreRope: they are of keys before RoPE, and are undone in the loop over tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from law_cases import holds

from kvdsl import calibrate, reference, roundtrip
from kvdsl.codegen import render
from kvdsl.codegen.launches import arguments
from kvdsl.codegen.plan import plan_for
from kvdsl.errors import SchemeError, ShapeError
from kvdsl.matrices import rotation
from kvdsl.params import ROPE, checked
from kvdsl.rope import NEAR, in_order, near, turned, usual
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
    "order": scheme(Permute(), scale=per_channel(tokens=32), recent=Recent(64)),
    "one by one": scheme(
        ChannelShift(), ChannelScale(), Permute("sum"), scale=per_token(channels=16), interleaved=True
    ),
    "factors": scheme(ChannelScale("absmax"), ChannelShift()),
    "order of digits": scheme(Permute(), code=Uniform(levels=3), scale=per_token(channels=32)),
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


@pytest.mark.parametrize("name", ["order", "one by one", "factors"])
def test_an_order_and_factors_are_the_map(name: str) -> None:
    """W[order[m], m] = outer[m], and what is added there is outer[m] * inner_shift[m]; the rest of W is 0."""
    shape, own = Shape(64, 2, 2), SCHEMES[name]
    generator = torch.Generator().manual_seed(3)
    k = torch.randn(1, 2, 64, 64, generator=generator) * torch.rand(64, generator=generator) + 2
    made = checked(own, shape, calibrate(own, k, k, params={ROPE: usual(64)}))
    order, outer, decode = (made[f"keys.{part}"] for part in ("order", "outer", "decode"))
    assert "keys.inner" not in made and order.dtype is torch.int32
    rows = torch.zeros(2, 64, 64).scatter(1, order.long()[:, None], outer[:, None])
    assert torch.equal(rows, decode.expand_as(rows))
    plan = plan_for(own, shape)
    assert (plan.keys.ordered, plan.keys.factored) == (name != "factors", name != "order")
    if name != "order":
        added = outer * made["keys.inner_shift"]
        right = made["keys.decode_shift"].expand(2, -1).gather(1, order.long())
        assert torch.allclose(added, right, rtol=2.0**-22, atol=0)


@pytest.mark.parametrize(
    ("name", "names", "matrix"),
    [
        ("order", {"keys_order_ptr"}, False),
        ("one by one", {"keys_order_ptr", "keys_outer_ptr", "keys_inner_shift_ptr"}, False),
        ("factors", {"keys_outer_ptr", "keys_inner_shift_ptr"}, False),
        ("chain", {"keys_inner_ptr", "keys_stride", "keys_outer_ptr", "keys_inner_shift_ptr"}, True),
    ],
)
def test_no_kernel_has_a_matrix_for_channels_one_by_one(name: str, names: set[str], matrix: bool) -> None:
    """Nor a product with one: each plane of decoded numbers has its two products with the queries and no others."""
    plan = plan_for(SCHEMES[name], Shape(64, 2, 8))
    text = render(plan, "triton", "t")
    for kernel in ("decode", "extend", "scores"):
        assert {argument for argument in arguments(text)[kernel] if argument.startswith("keys_")} == names
    body = text.partition("def scores(")[2].partition("\n@")[0]
    assert (body.count("tl.dot(") > 2 * plan.keys.layout.planes * plan.halves) == matrix


def test_channels_one_by_one_take_no_other_matrix() -> None:
    """Of an order alone no number has a factor; where there is none, channels keep their places."""
    shape, eye = Shape(64, 2, 2), torch.eye(64)[None]
    turned_over, doubled, mixed = eye.flip(1), 2 * eye, rotation("hadamard", 64, None, 64).float()[None]
    for name, good, bad in (("order", turned_over, doubled), ("factors", doubled, turned_over)):
        given = {ROPE: usual(64), "keys.encode_shift": torch.zeros(1, 64), "keys.decode_shift": torch.ones(1, 64)}
        made = checked(SCHEMES[name], shape, given | {"keys.encode": good.inverse(), "keys.decode": good})
        assert made["keys.order"].shape == made["keys.outer"].shape == (2, 64)
        for wrong in (bad, mixed, good.index_fill(2, torch.tensor([3]), 0.0)):
            with pytest.raises(ShapeError, match=r"'keys.decode'\]?: another matrix than .*PreRope.*; leave it out"):
                checked(SCHEMES[name], shape, given | {"keys.encode": eye, "keys.decode": wrong})


def test_waves_of_the_first_positions_stand_in_the_order_of_each_head() -> None:
    order = torch.stack([torch.randperm(32, generator=torch.Generator().manual_seed(i)) for i in (0, 1)])
    first = near(usual(24), 32, False, "cpu")  # the last 8 channels are not rotated
    got = in_order(first, order.int())
    assert got.shape == (2, NEAR, 64)
    for head in (0, 1):
        assert torch.equal(got[head, :, :32], first[:, :32][:, order[head]])
        assert torch.equal(got[head, :, 32:], first[:, 32:][:, order[head]])


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
