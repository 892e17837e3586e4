"""What is taken from data: tables of levels, second levels, calibrated scales of every code."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch

from kvdsl import api, reference
from kvdsl.calibration import matched, normalised, table
from kvdsl.errors import ShapeError
from kvdsl.levels import optimal
from kvdsl.params import ROPE, checked, wanted
from kvdsl.rope import turned
from kvdsl.scheme import (
    Block,
    Codebook,
    Float,
    PreRope,
    Scale,
    Scheme,
    Sinks,
    Store,
    Uniform,
    per_channel,
    per_tensor,
    per_token,
)
from kvdsl.shape import Shape

SECOND = per_tensor(dtype="fp32", when="calibrated")
ALL_HEADS = Scheme(both=Store(Float("e2m1"), scale=per_token(channels=16, dtype="e4m3", scale=SECOND)))


def data(heads: int = 2, tokens: int = 96) -> torch.Tensor:
    return torch.randn(2, heads, tokens, 64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("count", [2, 4, 8, 16])
def test_a_table_of_normal_numbers_is_nearly_the_best_one(count: int) -> None:
    numbers = torch.randn(400_000, generator=torch.Generator().manual_seed(0)).double()
    found = table(numbers, count, centred=False)
    error = (numbers[:, None] - found.double()).square().amin(1).mean()
    assert float(error) < 1.05 * optimal("normal", count)[1]
    assert torch.equal(found, table(numbers, count, centred=False))


def loss(numbers: torch.Tensor, weights: torch.Tensor, levels: torch.Tensor) -> float:
    """The weighted squared error of the nearest levels."""
    return float((weights * (numbers[:, None] - levels.double()).square().amin(1)).sum())


def least_loss(numbers: torch.Tensor, weights: torch.Tensor, count: int) -> float:
    """The same of the best levels, found by trying every way to cut the sorted numbers in `count` runs."""
    order = numbers.argsort()
    x, w = numbers[order], weights[order]
    found = []
    for inner in combinations(range(1, len(x)), count - 1):
        cuts = [0, *inner, len(x)]
        runs = [(x[a:b], w[a:b]) for a, b in pairwise(cuts)]
        found.append(sum(float((m * (y - (m * y).sum() / m.sum()).square()).sum()) for y, m in runs))
    return min(found)


@pytest.mark.parametrize("count", [2, 4, 8])
@pytest.mark.parametrize("kind", ["equal", "weighted", "far apart"])
def test_a_table_of_a_few_numbers_is_the_best_of_all(kind: str, count: int) -> None:
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        x, w = (torch.randn(11, generator=generator, dtype=torch.float64) for _ in range(2))
        weights = {"equal": torch.ones_like(w), "weighted": w.square(), "far apart": torch.exp(5 * w)}[kind]
        found = table(x, count, None if kind == "equal" else weights, centred=False)
        assert loss(x, weights, found) == pytest.approx(
            least_loss(x, weights, count), rel=1e-4, abs=float(1e-11 * weights.sum())
        )


def test_a_table_of_many_numbers_loses_no_more_than_one_of_cells() -> None:
    """More numbers than are sorted one by one.  Three levels of the numbers that count are those of half a law."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn((1 << 20) + 12345, generator=generator, dtype=torch.float64)
    found = table(x, 3, torch.where(x < 0, 1.0, 1e-9), centred=False)
    assert found.tolist() == pytest.approx(optimal("normal", 6)[0][:3], abs=5e-3)


def test_weights_draw_levels_to_where_they_are() -> None:
    x = torch.linspace(-1, 1, 2001, dtype=torch.float64)
    plain, right = table(x, 4, centred=False), table(x, 4, torch.where(x > 0.5, 100.0, 1.0), centred=False)
    assert plain.tolist() == pytest.approx([-0.75, -0.25, 0.25, 0.75], abs=1e-3)
    assert int((right > 0.5).sum()) >= 2 and bool((right > plain).all())
    assert torch.equal(right, table(x, 4, 7e-20 * torch.where(x > 0.5, 100.0, 1.0), centred=False))
    alone = torch.where(x > 0.5, 1.0, 0.0)
    assert bool((table(x, 4, alone, centred=False) > 0.5).all())


def test_weights_of_any_size_leave_levels_among_the_numbers() -> None:
    generator = torch.Generator().manual_seed(4)
    x, w = (torch.randn(5000, generator=generator, dtype=torch.float64) for _ in range(2))
    found = table(x, 16, torch.exp(40 * w), centred=False)
    assert bool((found[1:] > found[:-1]).all()) and x.min() <= found[0] and found[-1] <= x.max()


def test_a_table_of_few_different_numbers_still_rises() -> None:
    found = table(torch.zeros(100, dtype=torch.float64), 16, centred=False)
    assert bool((found[1:] > found[:-1]).all())


def test_a_second_level_puts_the_largest_scale_on_the_largest_number() -> None:
    k, v = data(), 3 * data()
    found = api.calibrate(ALL_HEADS, k, v)
    assert set(found) == {"keys.scale.scale", "values.scale.scale"}
    assert float(found["keys.scale.scale"]) == pytest.approx(float(k.abs().max()) / (6 * 448), rel=1e-6)
    each = ALL_HEADS.with_(
        both=ALL_HEADS.keys.with_(**{"scale.scale": Scale(Block(*[SECOND.block.tokens] * 2), when="calibrated")})
    )
    assert api.calibrate(each, k, v)["values.scale.scale"].shape == (2, 1)


def test_calibrated_levels_serve_better_than_those_of_another_law() -> None:
    k = data() ** 3
    given, fixed = (
        Scheme(both=Store(Codebook(4, levels), scale=per_token(range="absmax"))) for levels in ("calibrated", "normal")
    )
    params = api.calibrate(given, k, k)
    assert params["keys.code"].shape == (16,) and float(params["keys.code"].abs().max()) == 1.0
    errors = [
        float((api.roundtrip(scheme, k, k, backend="torch", params=numbers)[0] - k).square().mean())
        for scheme, numbers in ((given, params), (fixed, None))
    ]
    assert errors[0] < 0.7 * errors[1]


@pytest.mark.parametrize("weights", [None, "fisher"])
@pytest.mark.parametrize(
    "scale",
    [
        per_token(range="minmax", dtype="fp32"),
        per_token(range="absmax", dtype="fp32"),
        per_token(range="norm", dtype="fp32"),
        per_channel(when="calibrated", dtype="fp32"),
    ],
    ids=["minmax", "absmax", "norm", "calibrated"],
)
def test_matched_levels_keep_mean_and_deviation(scale: Scale, weights: str | None) -> None:
    """Of the numbers that they were calibrated on, over their scale; codes are those of the levels as they were."""
    k = data() + 0.3 * data().square()
    gradients = None if weights is None else (k.exp(), k.exp())
    plain = Scheme(both=Store(Codebook(2, "calibrated", weights=weights), scale=scale))  # type: ignore[arg-type]
    scheme = plain.with_(match="moments")
    before, after = (api.calibrate(one, k, k, gradients=gradients) for one in (plain, scheme))
    assert after["keys.code"].shape == (2, 4) and torch.equal(after["keys.code"][0], before["keys.code"])
    bare, found = (reference.quantize(one.keys, k, p) for one, p in ((plain, before), (scheme, after)))
    assert found.codes is not None and bare.codes is not None and torch.equal(bare.codes, found.codes)
    right, _ = normalised(scheme.keys.measure, k)  # type: ignore[arg-type]
    was, numbers = after["keys.code"].double()[:, found.codes]
    assert float(numbers.mean()) == pytest.approx(float(right.mean()), abs=1e-6)
    assert float(numbers.std()) == pytest.approx(float(right.std()), rel=1e-6)
    assert float(was.std()) != pytest.approx(float(right.std()), rel=1e-2)
    decoded, _ = api.roundtrip(scheme, k, k, backend="torch", params=after)
    assert torch.equal(decoded.double(), found.decoded)


def test_levels_match_numbers_that_have_no_deviation() -> None:
    """All of one level: moved there.  What they are compared with stays, and both rise."""
    levels = torch.tensor([-1.0, -0.5, 0.5, 1.0])
    right = torch.tensor([-0.8, -0.3, 0.7, 1.2])
    torch.testing.assert_close(matched(levels, torch.full((1001,), 0.7)), torch.stack([levels, right]))
    torch.testing.assert_close(matched(levels, torch.tensor([0.67, 0.73])), torch.stack([levels, right]))


def test_sinks_are_not_measured_and_positions_count_from_the_first_token() -> None:
    """A first token a thousand times larger leaves no trace; keys before RoPE are those of their own positions."""
    frequencies, k = 1e2 ** -(torch.arange(0, 64, 2) / 64), data()
    before, after = (
        Scheme(keys=Store(Uniform(4), scale=per_channel(when="calibrated"), transform=part), values=Store())
        for part in ((), PreRope())
    )
    large = torch.cat([1000 * k[:, :, :1], k], 2)
    right = api.calibrate(before, k, k)
    assert torch.equal(api.calibrate(before.with_(sinks=Sinks(1)), large, large)["keys.scale"], right["keys.scale"])
    placed = turned(large, frequencies, torch.arange(97), False).float()
    found = api.calibrate(after.with_(sinks=Sinks(1)), placed, large, params={ROPE: frequencies})
    assert torch.equal(found[ROPE], frequencies) and set(found) == {ROPE, "keys.scale"}
    torch.testing.assert_close(found["keys.scale"], right["keys.scale"], rtol=2e-3, atol=2e-3)
    with pytest.raises(ShapeError, match="missing; PreRope needs the model's frequencies"):
        api.calibrate(after, k, k)
    with pytest.raises(ShapeError, match="holds no token beside 96 sinks"):
        api.calibrate(before.with_(sinks=Sinks(96)), k, k)


def test_wrong_numbers_are_named() -> None:
    scheme, shape = Scheme(both=Store(Codebook(2, "calibrated"), scale=per_token())), Shape(64, 2)
    assert wanted(scheme, shape) == {"keys.code": (4,), "values.code": (4,)}
    falling = torch.tensor([1.0, 0.5, 0.0, -1.0])
    with pytest.raises(ShapeError, match=r"params\['keys.code'\]: the levels do not rise"):
        checked(scheme, shape, {"keys.code": falling, "values.code": falling})
    both = scheme.with_(match="moments")
    assert wanted(both, shape) == {"keys.code": (2, 4), "values.code": (2, 4)}
    twice = torch.stack([falling.flip(0), falling])
    with pytest.raises(ShapeError, match=r"params\['keys.code'\]: the levels do not rise"):
        checked(both, shape, {"keys.code": twice, "values.code": twice})
    with pytest.raises(ShapeError, match=r"params\['keys.code'\]: shape \(4,\); the right one is \(2, 4\)"):
        checked(both, shape, {"keys.code": falling, "values.code": falling})
    with pytest.raises(ShapeError, match=r"params\['keys.scale.scale'\]: 0.0 is no scale to divide by"):
        checked(ALL_HEADS, shape, dict.fromkeys(("keys.scale.scale", "values.scale.scale"), torch.zeros(1, 1)))


@pytest.mark.parametrize("code", [Codebook(3), Float("e4m3"), Float("e2m1"), Codebook(levels=(-1, 0, 1))], ids=str)
def test_every_code_takes_a_calibrated_scale(code: Codebook | Float) -> None:
    scheme = Scheme(both=Store(code, scale=per_tensor(when="calibrated")))
    k = data()
    params = api.calibrate(scheme, k, k)
    found, _ = api.roundtrip(scheme, k, k, backend="torch", params=params)
    assert float((found - k).square().mean()) < 0.4
