"""Weights by the loss: the derivatives that are observed, those of what is coded, and what tables make of them."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from kvdsl import calibrate, reference, roundtrip, schemes
from kvdsl.calibration import table
from kvdsl.errors import ShapeError
from kvdsl.fisher import coded, of_outputs, weighted
from kvdsl.hf import completed, observe, observed, weighed
from kvdsl.params import ROPE, checked
from kvdsl.reference.quantize import encoded_rows
from kvdsl.scheme import (
    ChannelScale,
    Codebook,
    Permute,
    Polar,
    PreRope,
    Rotate,
    Scheme,
    Sinks,
    Store,
    per_channel,
    per_token,
)
from kvdsl.shape import Shape

FISHER = Codebook(2, "calibrated", weights="fisher")
GIVEN = Scheme(both=Store(FISHER, scale=per_token()))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def of_projections(network: Any, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The derivatives of the library's own loss by what k_proj and v_proj of each layer give, (1, H, T, D)."""
    kept: list[Tensor] = []

    def keep(module: Any, given: Any, out: Tensor) -> Tensor:
        kept.append(out.requires_grad_())
        return out

    projections = [part for layer in network.model.layers for part in (layer.self_attn.k_proj, layer.self_attn.v_proj)]
    handles = [part.register_forward_hook(keep) for part in projections]
    try:
        mean = network(input_ids=ids, labels=ids, use_cache=False).loss
        found = torch.autograd.grad(mean * (ids.shape[1] - 1), kept)
    finally:
        for handle in handles:
            handle.remove()
    apart = [x.unflatten(-1, (2, 32)).transpose(1, 2) for x in found]
    return list(zip(apart[::2], apart[1::2], strict=True))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_derivatives_are_those_of_the_projections(family: str) -> None:
    """Of values as they are; of keys before their rotation, which is where KVQuant codes them."""
    network, ids = tiny.plain(tiny.model(family)), tiny.prompt(1, 21)
    right = of_projections(network, ids)
    frequencies = completed(schemes.ALL["nuq3"], network, None)
    store = schemes.ALL["nuq3"].keys
    found = weighed(network, ids)
    assert len(found) == len(right) == 2
    for index, ((k, _, _, (dk, dv)), (before, values)) in enumerate(zip(found, right, strict=True)):
        torch.testing.assert_close(dv, values, rtol=1e-3, atol=1e-5)
        numbers = {ROPE: frequencies[f"layers.{index}.{ROPE}"]}
        torch.testing.assert_close(coded(store, k, dk, numbers, "keys", 0).float(), before, rtol=1e-3, atol=1e-5)


def test_what_is_observed_beside_is_the_same_and_the_model_as_before() -> None:
    network, ids = tiny.plain(tiny.model("qwen3")), tiny.prompt(1, 12)
    weight = next(network.parameters()).requires_grad_()
    try:
        for seen, right in zip(weighed(network, ids), observed(network, ids), strict=True):
            for x, y in zip(seen, right, strict=False):
                assert x is not None and y is not None and not x.requires_grad  # type: ignore[union-attr]
                torch.testing.assert_close(x, y)
        assert network.config._attn_implementation == "eager" and weight.requires_grad and weight.grad is None
        assert sum(x.requires_grad for x in network.parameters()) == 1
    finally:
        weight.requires_grad_(False)


def test_a_long_text_is_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """17 tokens, at most 8 at a time: three texts of five."""
    network, ids = tiny.plain(tiny.model("llama")), tiny.prompt(1, 17)
    monkeypatch.setattr(observe, "PIECE", 8)
    whole = weighed(network, ids)
    for piece in range(3):
        alone = weighed(network, ids[:, 5 * piece : 5 * piece + 5])
        for (k, v, q, (dk, dv)), (k1, v1, q1, (dk1, dv1)) in zip(whole, alone, strict=True):
            assert q is not None and q1 is not None and k.shape == (3, 2, 5, 32)
            for many, one in ((k, k1), (v, v1), (q, q1), (dk, dk1), (dv, dv1)):
                torch.testing.assert_close(many[piece : piece + 1], one)


LINEAR = (Rotate("orthogonal", seed=1), ChannelScale("absmax"), Permute("sum"))


@pytest.mark.parametrize(
    "transform",
    [(), LINEAR, (Polar(),), (*LINEAR, Polar()), (PreRope(),)],
    ids=["none", "maps", "polar", "both", "rope"],
)
def test_derivatives_by_what_is_coded_tell_how_the_loss_changes(transform: tuple[Any, ...]) -> None:
    """Of L(x) = <g, x>: a small step dy of what is coded changes it by <dL/dy, dy>."""
    store, x, g, step = Store(transform=transform), normal(2, 2, 6, 16), normal(2, 2, 6, 16, seed=1), 1e-3
    params = {
        "keys.transform[1]": torch.rand(2, 16, generator=torch.Generator().manual_seed(2)) + 0.5,
        "keys.transform[2]": torch.stack([torch.arange(16.0).flip(0), torch.arange(16.0).roll(3)]),
        ROPE: torch.linspace(1, 0.1, 8),
    }
    params = params if transform != (PreRope(),) else {ROPE: params[ROPE]}
    there = encoded_rows(store, x, params, "keys", 3).double()
    found = coded(store, x, g, params, "keys", 3)
    moved = encoded_rows(store, x + step * normal(2, 2, 6, 16, seed=4), params, "keys", 3).double()
    size = (g * step * normal(2, 2, 6, 16, seed=4)).sum((2, 3)).double()
    torch.testing.assert_close((found * (moved - there)).sum((2, 3)), size, rtol=2e-2, atol=2e-4)


def test_derivatives_of_outputs() -> None:
    """By a small step of one number each."""
    q, k, v = normal(1, 4, 3, 8), normal(1, 2, 6, 8, seed=1), normal(1, 2, 6, 8, seed=2)
    dk, dv = of_outputs(q, k, v)
    u = normal(1, 4, 3, 8)  # the seed that it draws from

    def told(k: Tensor, v: Tensor) -> float:
        out, _ = reference.attend(schemes.ALL["fp32"], q, k, v)
        return float((out * u).sum())

    for x, dx, side in ((k, dk, 0), (v, dv, 1)):
        for place in ((0, 0, 2, 3), (0, 1, 4, 0)):
            up, down = x.clone(), x.clone()
            up[place] += 1e-2
            down[place] -= 1e-2
            sides = [(up, v), (down, v)] if side == 0 else [(k, up), (k, down)]
            slope = (told(*sides[0]) - told(*sides[1])) / 2e-2
            assert float(dx[place]) == pytest.approx(slope, rel=2e-2, abs=1e-3)


@pytest.mark.parametrize("scale", [per_token(), per_channel(when="calibrated")], ids=["token", "channel"])
def test_a_weighted_table_costs_the_loss_least(scale: Any) -> None:
    """sum (g (x - x^))^2 of the numbers themselves: less than where all numbers count alike, or where errors are
    weighed over their scales, or by |g|.  Channels differ in size and in their law, tokens too."""
    scheme = Scheme(keys=Store(FISHER, scale=scale), values=Store())
    size = torch.linspace(0.1, 3, 32) * torch.linspace(0.2, 2, 256)[:, None]
    x = normal(1, 2, 256, 32, seed=5)
    k = torch.where(size > 1, x**3 / 4, x) * size
    g = torch.where(k.abs() > 2 * size, 10.0, 1.0) * normal(1, 2, 256, 32, seed=6)
    low, high = k.double().aminmax(dim=3 if scale.when == "online" else 2, keepdim=True)
    unit, middle = (high - low) / 2, (high + low) / 2
    right = calibrate(scheme, k, k, gradients=(g, g))
    by_hand = table((k - middle) / unit, 4, (g * unit) ** 2, centred=False)
    torch.testing.assert_close(right["keys.code"], by_hand, rtol=1e-5, atol=1e-6)
    others = [torch.ones_like(g), g / unit.float(), (g / unit.float()).abs().sqrt()]
    tables = [right["keys.code"], *(calibrate(scheme, k, k, gradients=(o, o))["keys.code"] for o in others)]
    lost = []
    for levels in tables:
        found, _ = roundtrip(scheme, k, k, backend="torch", params={**right, "keys.code": levels})
        lost.append(float((g * (found - k)).square().sum()))
    assert all(lost[0] < 0.97 * other for other in lost[1:]), lost


def test_a_common_factor_changes_nothing_and_sinks_are_not_weighed() -> None:
    k, v = normal(1, 2, 65, 32), normal(1, 2, 65, 32, seed=1)
    gradients = normal(1, 2, 65, 32, seed=2), normal(1, 2, 65, 32, seed=3)
    scheme = GIVEN.with_(sinks=Sinks(1))
    right = calibrate(scheme, k, v, gradients=gradients)
    changed = tuple((1e-6 * x).index_fill(2, torch.tensor([0]), 1e6) for x in gradients)
    found = calibrate(scheme, k, v, gradients=changed)
    for name in ("keys.code", "values.code"):
        torch.testing.assert_close(found[name], right[name])


def test_weights_belong_to_their_side_alone() -> None:
    mixed = Scheme(keys=Store(FISHER, scale=per_token()), values=GIVEN.values.with_(weights=None))
    assert weighted(mixed) and weighted(mixed.keys) and not weighted(mixed.values)
    k, v, ones = normal(1, 2, 64, 32), normal(1, 2, 64, 32, seed=1), torch.ones(1, 2, 64, 32)
    plain = calibrate(mixed.with_(weights=None), k, v)
    found = calibrate(mixed, k, v, gradients=(torch.where(k > 0, 1.0, 0.0), ones))
    assert torch.equal(found["values.code"], plain["values.code"])
    assert float(found["keys.code"].mean()) > float(plain["keys.code"].mean()) + 0.1


def test_what_is_missing_or_wrong_is_said() -> None:
    k, ones = normal(1, 2, 8, 32), torch.ones(1, 2, 8, 32)
    with pytest.raises(ShapeError, match=r"gradients: missing; keys.code has weights='fisher', give gradients=\(dk"):
        calibrate(GIVEN, k, k)
    with pytest.raises(ShapeError, match=r"gradients\['values'\]: shape \(1, 2, 7, 32\); the right shape is \(1, 2, 8"):
        calibrate(GIVEN, k, k, gradients=(ones, ones[:, :, 1:]))
    with pytest.raises(ShapeError, match=r"gradients\['keys'\]: NoneType is no tensor"):
        calibrate(GIVEN, k, k, gradients=(None, ones))
    with pytest.raises(ShapeError, match=r"gradients\['keys'\]: all are 0"):
        calibrate(GIVEN, k, k, gradients=(0 * ones, ones))
    with pytest.raises(ShapeError, match=r"gradients\['values'\]: it holds numbers that are not finite"):
        calibrate(GIVEN, k, k, gradients=(ones, ones / 0))
    told = r"params\['keys.code'\]: missing; .*calibrate\(scheme, k, v, gradients=\(dk, dv\)\) of typical k and v, and"
    with pytest.raises(ShapeError, match=told):
        checked(GIVEN, Shape(32, 2), None)
