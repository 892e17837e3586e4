"""Single numbers beyond calibrated thresholds, and those of keys before RoPE: definition, calibration, kernels."""

from __future__ import annotations

import pytest
import torch
from law_cases import THRESHOLDS
from torch import Tensor

import kvdsl
from kvdsl import Block, PreRope, Recent, Scheme, Sparse, Store, Uniform, per_channel, per_token, reference, schemes
from kvdsl.codegen import host_slots, render
from kvdsl.codegen.launches import launches
from kvdsl.codegen.lint import faults_in
from kvdsl.codegen.plan import plan_for
from kvdsl.codegen.show import View, show
from kvdsl.codes import Fill
from kvdsl.errors import ShapeError
from kvdsl.fitting import thresholds, without_single
from kvdsl.params import ROPE, wanted
from kvdsl.reference.sparse import kept_numbers, pick
from kvdsl.rope import usual
from kvdsl.scheme import ALL, SIDES, ChannelScale, Codebook, Float, Side
from kvdsl.shape import Shape

WHOLE = Block(ALL, 1)
KEYS = Scheme(
    keys=Store(
        Codebook(2, "calibrated", match="moments"),
        scale=per_channel(when="calibrated"),
        transform=PreRope(),
        outliers=Sparse(0.1, WHOLE, slots=2, fill="clamp", when="calibrated"),
    ),
    values=Store(),
    recent=Recent(64),
)
FREQUENCIES = {ROPE: usual(32)}


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def channel(*numbers: float) -> Tensor:
    return torch.tensor(numbers)[None, None, :, None]


def test_thresholds_by_hand() -> None:
    """Percentiles of a channel's tokens in proportion, as float16: of five numbers a quarter of the way is the second,
    a twentieth is between the first two."""
    x = channel(4, 0, 2, 3, 1)
    assert thresholds(Sparse(0.49, WHOLE, when="calibrated"), x).flatten().tolist() == pytest.approx([0.98, 3.02], 1e-3)
    found = thresholds(Sparse(0.1, WHOLE, when="calibrated"), x)
    assert torch.equal(found.flatten(), torch.tensor([0.2, 3.8]).half().float())


BY_HAND: dict[Fill, list[float]] = {"mean": [3, 1, 5, 3, 7], "clamp": [1, 1, 5, 5, 7], "zero": [0, 1, 5, 0, 7]}


@pytest.mark.parametrize("fill", BY_HAND)
def test_by_hand(fill: Fill) -> None:
    """Of numbers below 1 or above 5 the farthest two of a token have slots; 1 and 5 themselves are none of them."""
    code = Sparse(0.1, WHOLE, slots=2, fill=fill, when="calibrated")
    given = torch.tensor([1.0, 5.0])[:, None, None].expand(2, 1, 5)
    found = pick(torch.tensor([-9.0, 1, 5, 19, 7]).double()[None, None, None], code, "keys", given)
    assert found.filled.flatten().tolist() == BY_HAND[fill] and found.taken.sum() == 3
    assert found.places.flatten().tolist() == [3, 0]
    assert not pick(torch.full((1, 1, 1, 5), torch.nan).double(), code, "keys", given).taken.any()


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("fill", BY_HAND)
def test_what_is_packed_is_what_is_defined(fill: Fill, side: Side) -> None:
    """Bit for bit, with too few slots, and many; infinities and NaN among the numbers."""
    x, rest = normal(2, 2, 2, 128, 32)
    x = torch.where(x > 3, torch.inf, torch.where(x < -3, torch.nan, x))
    given = thresholds(Sparse(0.15, WHOLE), normal(1, 2, 300, 32, seed=1))
    for slots in (1, 32):
        code = Sparse(0.15, WHOLE, slots=slots, fill=fill, when="calibrated")
        right, got = pick(x.double(), code, side, given), host_slots.split(x, code, side, given)
        torch.testing.assert_close(got.filled.double(), right.filled, rtol=0, atol=0, equal_nan=True)
        numbers = kept_numbers(rest.double(), right, side)
        numbers = numbers.unflatten(2, (-1, 64)).mT if side == "keys" else numbers
        assert torch.equal(host_slots.kept(rest, got, side), numbers.half().view(torch.int16))
        assert bool((right.kept != right.taken).any()) == (slots == 1)


def test_codes_are_fitted_to_what_lies_within() -> None:
    """The range of keys without positions ends at the thresholds, whatever lies beyond them, and neither a table nor
    the moments that it keeps are of what stands in."""
    k = normal(1, 2, 300, 32)
    k[:, :, ::50] *= 30
    found = kvdsl.calibrate(KEYS, k, k, params=FREQUENCIES)
    assert {name: tuple(x.shape) for name, x in found.items()} == wanted(KEYS, Shape(32, 2)) and ROPE in found
    assert torch.equal(found[ROPE], FREQUENCIES[ROPE])
    bare = reference.quantize(Store(Float("fp32"), transform=PreRope()), k, FREQUENCIES).coded
    low, high = found["keys.outliers"]
    assert torch.equal(found["keys.outliers"], thresholds(KEYS.keys.outliers, bare))
    right = torch.stack([high - low, high + low]) / 2
    assert torch.equal(found["keys.scale"], right.half().float())
    inside = (bare >= low[:, None]) & (bare <= high[:, None])
    numbers = ((bare - (high + low)[:, None] / 2) / ((high - low)[:, None] / 2))[inside]
    levels, decoded = found["keys.code"].double()
    codes = (numbers[:, None] - levels).abs().argmin(-1)
    torch.testing.assert_close(decoded[codes].mean(), numbers.double().mean(), rtol=0, atol=1e-3)
    torch.testing.assert_close(decoded[codes].std(), numbers.double().std(), rtol=1e-3, atol=0)


def test_numbers_without_slots_count_in_fits_online() -> None:
    """What codes see online is without those that have slots only; beyond thresholds there is nothing left."""
    x, code = normal(1, 1, 100, 32), Sparse(0.2, slots=1)
    seen, single, _ = without_single(Store(outliers=code), "keys", x, {})
    assert single is not None and int(single.sum()) == 64 and torch.equal(seen[:, :, 64:], x[:, :, 64:])
    code = Sparse(0.2, WHOLE, slots=1, fill="clamp", when="calibrated")
    seen, single, given = without_single(Store(outliers=code), "keys", x, {})
    low, high = given["keys.outliers"][:, :, None]
    assert single is not None and torch.equal(seen, x.clamp(low, high)) and torch.equal(single, (x < low) | (x > high))


def test_what_is_given_has_to_fit() -> None:
    k = normal(1, 2, 128, 32)
    params = kvdsl.calibrate(KEYS, k, k, params=FREQUENCIES)
    asked = {"backend": "torch", "window": False}
    for given, said in (
        ({}, r"params\['keys.outliers'\]: missing; it is calibrated"),
        ({"keys.outliers": params["keys.outliers"][0]}, r"shape \(2, 32\); the right one is \(2, 2, 32\)"),
        ({"keys.outliers": params["keys.outliers"].flip(0)}, "a lower threshold is above the upper one"),
    ):
        rest = {name: x for name, x in params.items() if name != "keys.outliers"}
        with pytest.raises(ShapeError, match=said):
            kvdsl.roundtrip(KEYS, k, k, params=rest | given, **asked)


def test_positions_go_back_on_the_sum() -> None:
    """Numbers with a slot are those that are coded: at any position they are read as they were, and with as many slots
    as channels, all beyond the thresholds, so is every number."""
    k = normal(1, 1, 192, 32)
    code = Sparse(0.1, WHOLE, slots=32, when="calibrated")
    scheme = KEYS.with_(keys=Store(Uniform(1), scale=per_token(), transform=(PreRope(), ChannelScale()), outliers=code))
    params = kvdsl.calibrate(scheme, k, k, params=FREQUENCIES)
    params["keys.outliers"] = torch.stack([torch.ones(1, 32), torch.ones(1, 32)])
    got, _ = kvdsl.roundtrip(scheme, k, k, params=params, backend="torch", window=False)
    assert (got - k).abs().max() < 2e-3


def test_slots_hold_most() -> None:
    """Of normal numbers, of thresholds of other ones."""
    x, y = (normal(1, 8, tokens, 128, seed=5).double() for tokens in (1024, 4096))
    shares = []
    for side in SIDES:
        code = schemes.ALL["kvquant3"].side(side).outliers
        assert isinstance(code, Sparse)
        found = pick(x, code, side, thresholds(code, y) if side == "keys" else None)
        shares.append(float(found.kept.sum() / found.taken.sum()))
    assert shares == pytest.approx([0.84, 0.75], abs=0.01)


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_score_gathers_the_query_twice(interleaved: bool) -> None:
    """At every slot's place as it is and a quarter turn on, by the token's own wave; nothing else of it is made."""
    scheme = schemes.ALL["kvquant3"]
    scheme = scheme.with_(keys=scheme.keys.with_(transform=PreRope(interleaved)))
    text = render(plan_for(scheme, Shape(128, 8, 32)), "triton", "mine")
    loop = text.partition("def decode(")[2].partition("for tile in")[2].partition("    else:")[0]
    own = [line.strip() for line in loop.splitlines() if line.strip().startswith(("ko_", "so "))]
    assert sum("tl.load(gathered + (ko_place[" in line for line in own) == 2 * 2
    assert sum("tl.load(gathered + (ko_place + queries" in line for line in own) == 2 * 2
    assert sum("tl.load(ko_wave_at" in line for line in own) == 2 * 2 * 2
    assert not any(word in line for line in own for word in ("tl.dot(", "==", "tl.zeros("))


def test_its_kernels_are_clean_text_and_proven() -> None:
    for plan in (plan_for(THRESHOLDS, shape) for shape in (Shape(128, 8, 32), Shape(64, 2, 4, "fp32"))):
        text = render(plan, "triton", "mine")
        assert faults_in(text, launches(plan, text)) == []
    told = "\n".join(show(View("it", schemes.ALL["kvquant3"], Shape(128, 2)), "normal-form")[1])
    assert "q . x[t] = sum_i n[t, i]*q[t, m[t, i]]   [exhaustive (16 cases)]" in told
    assert "[symbolic, for one pair and a number in either place]" in told
