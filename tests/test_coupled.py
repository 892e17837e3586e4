"""Codes of vectors: tables that k-means fits, the nearest vector, and what coupling channels gains (CQ)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import kvdsl
from kvdsl import ALL, Scheme, Store, reference
from kvdsl.clusters import clustered, vectors
from kvdsl.errors import SchemeError, ShapeError
from kvdsl.head_shares import HeadShare, params_of
from kvdsl.params import ROPE, load, save
from kvdsl.rules import shape_faults
from kvdsl.scheme import (
    Balance,
    Codebook,
    Polar,
    PreRope,
    Rotate,
    Sparse,
    Transform,
    Uniform,
    Vectors,
    per_channel,
    per_token,
)
from kvdsl.schemes import cq_2c8b, cq_4c8b, cq_8c8b

PAIRS = Scheme(both=Store(Vectors(4, channels=2)))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lost(store: Store, x: torch.Tensor) -> float:
    """The mean squared error of what a store keeps of x, calibrated on it."""
    scheme = Scheme(both=store)
    given = kvdsl.calibrate(scheme, x, x)
    return (reference.roundtrip(scheme, x, x, params=given)[0] - x).square().mean().item()


def test_coupled_channels_lose_less_of_correlated_numbers_at_equal_bits() -> None:
    """The claim of CQ: the more channels share a code, the less is lost, and far less where channels depend on one
    another.  Of independent normal numbers a better packing is all there is to gain."""
    own, common = normal(1, 1, 2048, 32), normal(1, 1, 2048, 8, seed=1).repeat_interleave(4, -1)
    found = []
    for x in (own, (0.3 * own + common) / 1.09**0.5):
        single = Store(Codebook(1, "calibrated"), scale=per_channel(tokens=ALL, when="calibrated"))
        found.append([lost(single, x), *(lost(Store(Vectors(c, channels=c)), x) for c in (2, 4))])
    for errors in found:
        assert errors == sorted(errors, reverse=True)
    assert found[0][2] > 0.8 * found[0][0] and found[1][2] < 0.2 * found[1][0]


def test_every_vector_gets_the_nearest_one_of_its_table_and_of_several_the_first() -> None:
    x, table = normal(1, 2, 64, 32), normal(2, 16, 16, 2, seed=1)
    table[:, :, 9] = table[:, :, 4]
    table[0, 0, :2] = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])  # as near to 0 and 3 as one another
    x[0, 0, 0, :2] = torch.tensor([0.0, 3.0])
    table = table.half().float()
    table[0, 0, 2:] += 8
    kept = reference.quantize(PAIRS.keys, x, {"keys.code": table})
    far = (x.unflatten(-1, (16, 1, 2)) - table[:, None]).double().square().sum(-1)
    assert kept.codes is not None and torch.equal(kept.codes, far.argmin(-1))
    assert kept.codes[0, 0, 0, 0] == 0 and not bool((kept.codes == 9).any())
    got = kvdsl.roundtrip(PAIRS, x, x, params={"keys.code": table, "values.code": table}, backend="torch")
    assert torch.equal(got[0].double(), kept.decoded)


def test_clusters_that_lie_apart_are_found_and_weights_move_them() -> None:
    places = 10 * torch.eye(4, dtype=torch.float64)
    rows = places.repeat(50, 1) + 0.1 * normal(200, 4).double()
    generator = torch.Generator().manual_seed(0)
    found = clustered(rows, torch.ones(200, dtype=torch.float64), 4, generator)
    means = rows.unflatten(0, (50, 4)).mean(0)
    assert torch.allclose(found[(places @ found.mT).argmax(-1)], means)
    weights = torch.where(torch.arange(200) % 4 == 3, 0.0, 1.0).double()  # nothing asks for the last one
    found = clustered(rows, weights, 3, generator)
    assert torch.allclose(found[(places[:3] @ found.mT).argmax(-1)], means[:3])


def test_tables_are_the_same_again_and_hold_every_vector_of_a_few() -> None:
    x = normal(1, 2, 12, 16)
    code = Vectors(4, channels=8)
    table = vectors(code, x)
    assert table.shape == (2, 2, 16, 8) and torch.equal(table, vectors(code, x))
    scheme = Scheme(both=Store(code))
    got, _ = reference.roundtrip(scheme, x, x, params={"keys.code": table, "values.code": table})
    assert torch.equal(got.float(), x.half().float())


def test_the_loss_weighs_whole_vectors() -> None:
    """F of a group is the sum of its channels' squared derivatives: tokens without any do not count."""
    scheme = Scheme(both=Store(Vectors(2, channels=4, weights="fisher")))
    x, cared = normal(1, 1, 64, 32), torch.zeros(1, 1, 64, 32)
    cared[:, :, :4, ::4] = 1.0  # four vectors a group
    given = kvdsl.calibrate(scheme, x, x, gradients=(cared, cared))
    got, _ = reference.roundtrip(scheme, x, x, params=given)
    assert torch.equal(got[:, :, :4].float(), x[:, :, :4].half().float())
    with pytest.raises(ShapeError, match="gradients: missing; keys.code has weights='fisher'"):
        kvdsl.calibrate(scheme, x, x)


def test_bits_and_tables_of_cq() -> None:
    for scheme, count in ((cq_2c8b, 4.0), (cq_4c8b, 2.0), (cq_8c8b, 1.0)):
        counted = kvdsl.bits(scheme, head_dim=128, kv_heads=8)
        assert (counted.keys, counted.values, counted.padding) == (count, count, 0)
        assert counted.constants == 2 * 8 * 128 * 256 * 2  # of either side 256 numbers of 2 bytes a channel
    assert str(cq_8c8b.keys) == "Store(Vectors(8, channels=8, weights='fisher'), transform=(PreRope(),))"
    assert Scheme.from_toml(cq_8c8b.to_toml()) == cq_8c8b


def test_parameters_are_asked_for_checked_kept_and_shared_among_ranks(tmp_path: Path) -> None:
    x = normal(1, 2, 40, 32)
    with pytest.raises(ShapeError, match=r"params\['keys.code'\]: missing; it is calibrated"):
        kvdsl.roundtrip(PAIRS, x, x)
    given = kvdsl.calibrate(PAIRS, x, x)
    with pytest.raises(ShapeError, match=r"70000.0 is beyond float16.*give numbers within 65504"):
        kvdsl.roundtrip(PAIRS, x, x, params=given | {"keys.code": torch.full((2, 16, 16, 2), 7e4)})
    with pytest.raises(ShapeError, match=r"the right one is \(2, 16, 16, 2\)"):
        kvdsl.roundtrip(PAIRS, x, x, params=given | {"keys.code": given["keys.code"][:1]})
    save(tmp_path / "given.safetensors", PAIRS, given)
    again = load(tmp_path / "given.safetensors", PAIRS)
    got, want = (kvdsl.roundtrip(PAIRS, x, x, params=one, backend="torch")[0] for one in (again, given))
    assert torch.equal(got, want)
    part = params_of(PAIRS, HeadShare(1, 2, 2), given)
    assert torch.equal(kvdsl.roundtrip(PAIRS, x[:, 1:], x[:, 1:], params=part, backend="torch")[0], want[:, 1:])


def test_vectors_are_of_keys_without_positions() -> None:
    """A key that turns with its position is the same vector at each."""
    rope = {ROPE: 1e4 ** (-torch.arange(0, 32, 2) / 32)}
    scheme = Scheme(keys=Store(Vectors(1, channels=4), transform=PreRope()), values=Store())
    bare, angle = normal(1, 1, 1, 32), torch.arange(80)[:, None] * rope[ROPE]
    low, high = bare.chunk(2, -1)
    k = torch.cat([low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin()], -1)
    given = kvdsl.calibrate(scheme, k, k, params=rope)
    got, _ = kvdsl.roundtrip(scheme, k, k, params=given, backend="torch")
    assert (got - k).abs().max() < 2.0**-9


@pytest.mark.parametrize(
    ("store", "place"),
    [
        (Store(Vectors(8, channels=3)), "code.channels: the 3 numbers of a vector are no power of two"),
        (Store(Vectors(8, channels=16)), "code.channels: 16 channels are more than 8"),
        (Store(Vectors(9, channels=4)), "code.bits: 9 bits are more than 8"),
        (Store(Vectors(8, channels=4), scale=per_token()), "scale: vectors are of numbers as they come"),
        (Store(Vectors(8, channels=4), outliers=Sparse()), "outliers: vectors are of all channels"),
        (
            Store(Vectors(8, channels=4), residual=Store(Uniform(1), scale=per_token())),
            "residual: what vectors leave is not coded",
        ),
        (Store(Uniform(2), scale=per_token(), residual=Store(Vectors(8, channels=4))), "residual.code: tables of"),
    ],
)
def test_what_is_refused(store: Store, place: str) -> None:
    with pytest.raises(SchemeError) as refused:
        Scheme(keys=store, values=Store())
    assert f"keys.{place}" in str(refused.value)


@pytest.mark.parametrize(
    ("maps", "place"),
    [
        (Polar(), "transform[0]: Polar is followed by codes of single numbers"),
        (Balance(32), "transform[0]: Balance is followed by codes of single numbers"),
        (Rotate("hadamard", heads=2), "transform[0].heads: tables of vectors are a head's own"),
        ((PreRope(), Rotate("hadamard")), "transform[1]: behind PreRope() vectors are of neighbouring channels"),
    ],
)
def test_what_is_refused_before_vectors(maps: Transform | tuple[Transform, ...], place: str) -> None:
    with pytest.raises(SchemeError) as refused:
        Scheme(keys=Store(Vectors(8, channels=4), transform=maps), values=Store())
    assert f"keys.{place}" in str(refused.value)


def test_what_is_refused_at_a_shape() -> None:
    scheme = Scheme(keys=Store(Vectors(3, channels=8)), values=Store())
    faults = shape_faults(scheme, kvdsl.Shape(32, 1))
    assert [str(fault) for fault in faults] == [
        "keys.code.bits: 4 codes of 3 bits, of head_dim 32, fill no whole bytes; use bits=2 or 8"
    ]
