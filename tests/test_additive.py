"""Sums of vectors: stages, entries that commute with rotary positions, tables that are fitted, bits (CommVQ)."""

from __future__ import annotations

import pytest
import torch

import kvdsl
from kvdsl import ALL, Scheme, Store, reference
from kvdsl.additive import sums
from kvdsl.errors import SchemeError
from kvdsl.head_shares import HeadShare, faults
from kvdsl.rules import shape_faults
from kvdsl.scheme import Additive, Balance, PreRope, Rotate, Scale, Transform, Uniform, per_token
from kvdsl.schemes import commvq, commvq_1bit

RMS = per_token(heads=ALL)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def turned(x: torch.Tensor, angle: torch.Tensor, *, interleaved: bool) -> torch.Tensor:
    """x (..., D) with every pair turned by its angle (D / 2,)."""
    low, high = x.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else x.chunk(2, -1)
    first, second = low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin()
    return torch.stack([first, second], -1).flatten(-2) if interleaved else torch.cat([first, second], -1)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_positions_turn_sums_as_they_turn_the_entries(interleaved: bool) -> None:
    """CommVQ, section 3.2: R k^ is the sum of the same codes' entries of tables that R turned, which no table has whose
    second code is of entries as they are."""
    code, table, angle = Additive(2, stages=3, commuting=True), normal(1, 3, 4, 16), normal(8, seed=1).double()
    store = Store(code, scale=RMS, transform=PreRope(interleaved=interleaved))
    rope = {"keys.transform[0]": torch.zeros(8), "keys.code": table.half().float()}
    kept = reference.quantize(store, normal(1, 1, 20, 16, seed=2), rope)
    assert kept.codes is not None and kept.codes.shape == (1, 1, 20, 6) and kept.scale is not None
    read = turned(table.half().double(), angle, interleaved=interleaved)
    quarters = turned(read, torch.full((8,), torch.pi / 2).double(), interleaved=interleaved)
    total = sum((read, quarters)[turn % 2][0, turn // 2][kept.codes[..., turn]] for turn in range(6))
    got = turned(kept.decoded, angle, interleaved=interleaved)
    assert torch.allclose(got, total * kept.scale[..., None].flatten(2)[..., None], atol=1e-5)


def test_every_stage_takes_the_nearest_entry_to_what_is_left_and_of_several_the_first() -> None:
    table = torch.zeros(1, 2, 4, 32)
    table[0, 0, :, 0] = torch.tensor([1.0, 3.0, 3.0, -2.0])
    table[0, 1, :, 0] = torch.tensor([0.0, 0.5, -0.5, 0.25])
    x = torch.zeros(1, 1, 3, 32)
    x[0, 0, :, 0], x[0, 0, :, 1] = torch.tensor([4.0, 1.0, -1.5]), torch.tensor([4.0, 31.0**0.5, 29.75**0.5])
    scheme = Scheme(both=Store(Additive(2, stages=2), scale=per_token()))  # scales of 1
    given = {"keys.code": table, "values.code": table}
    kept = reference.quantize(scheme.keys, x, given)
    assert kept.codes is not None and kept.codes[0, 0].tolist() == [[1, 1], [0, 0], [3, 1]]
    assert kept.decoded[0, 0, :, 0].tolist() == [3.5, 1.0, -1.5]
    got, _ = kvdsl.roundtrip(scheme, x, x, params=given, backend="torch")
    assert torch.equal(got.double(), kept.decoded)


def test_one_norm_is_of_all_heads_of_a_token() -> None:
    """As CommVQ's: a head that is small beside another is small in units of its table, too."""
    x = normal(1, 2, 8, 16) * torch.tensor([1.0, 7.0])[:, None, None]
    kept = reference.quantize(Store(Additive(1, stages=1), scale=RMS), x, {"keys.code": normal(2, 1, 2, 16)})
    assert kept.scale is not None and kept.scale.shape == (1, 1, 8, 1)
    assert torch.allclose(kept.scale[0, 0, :, 0], x.double().square().mean((1, 3)).sqrt()[0], rtol=2.0**-10)


@pytest.mark.parametrize("commuting", [False, True])
def test_every_stage_of_fitted_tables_leaves_less_of_other_vectors(commuting: bool) -> None:
    """Of 4 bits for 32 channels the best code leaves 2^(-8/32) = 0.84 of normal numbers a stage."""
    code = Additive(2 if commuting else 4, stages=3, commuting=commuting)
    seen, other = normal(1, 1, 1024, 32), normal(1, 1, 512, 32, seed=1)
    table = sums(code, Scale(), seen, interleaved=False)
    assert torch.equal(table, sums(code, Scale(), seen, interleaved=False))
    lost = [1.0]
    for stages in (1, 2, 3):
        scheme = Scheme(both=Store(Additive(code.bits, stages=stages, commuting=commuting), scale=per_token()))
        given = {"keys.code": table[:, :stages], "values.code": table[:, :stages]}
        got, _ = kvdsl.roundtrip(scheme, other, other, params=given, backend="torch")
        lost.append((got - other).square().mean().item())
    assert all(0.84 < after / before < 0.92 for before, after in zip(lost, lost[1:], strict=False))


def test_codes_of_commvq_are_as_short_as_published() -> None:
    """252 bits of 128 channels, not the 21 words of 16 that the released code keeps (2.63 bits)."""
    for scheme, keys, values in ((commvq, 252, 256), (commvq_1bit, 126, 128)):
        counted = kvdsl.bits(scheme, head_dim=128, kv_heads=8)
        assert [side.code for side in counted.sides] == [keys / 128, values / 128]
        assert [side.metadata for side in counted.sides] == [16 / 1024] * 2
        assert counted.sides[0].padding == -keys % 8 / 128 and counted.sides[1].padding == 0
        assert Scheme.from_toml(scheme.to_toml()) == scheme
    of_64 = kvdsl.bits(commvq, head_dim=64, kv_heads=8)  # 10 stages of 12 bits, 32 of 4
    assert [side.code for side in of_64.sides] == [120 / 64, 2]
    assert kvdsl.bits(commvq, head_dim=128, kv_heads=8).constants == 8 * 128 * 2 * (21 * 64 + 64 * 16)


def test_a_norm_of_all_heads_keeps_ranks_from_parting_them() -> None:
    assert "heads" in str(faults(commvq, HeadShare(0, 2, 8))[0])
    assert not faults(commvq.with_(scale=per_token()), HeadShare(0, 2, 8))


@pytest.mark.parametrize(
    ("store", "place"),
    [
        (Store(Additive(9, stages=2), scale=RMS), "code.bits: 9 bits are more than 8"),
        (Store(Additive(8, stages=0), scale=RMS), "code.stages: 0 stages are fewer than 1"),
        (Store(Additive(8, stages=1.5), scale=RMS), "code.stages: 1.5 is no share of channels"),
        (Store(Additive(8, stages=2)), "scale: stages refine vectors of about one size"),
        (Store(Additive(8, stages=2), scale=per_token(channels=16)), "scale.block: the size of a vector is one number"),
        (Store(Additive(8, stages=2), scale=per_token(range="absmax")), "scale.range: the size of a vector is its"),
        (Store(Additive(8, stages=2), scale=per_token(refit="norm")), "scale: codes are looked for once"),
        (Store(Additive(8, stages=2), scale=RMS, residual=Store(Uniform(1), scale=per_token())), "residual: what the"),
        (Store(Uniform(2), scale=per_token(), residual=Store(Additive(8, stages=2), scale=RMS)), "residual.code: "),
    ],
)
def test_what_is_refused(store: Store, place: str) -> None:
    with pytest.raises(SchemeError) as refused:
        Scheme(keys=store, values=Store())
    assert f"keys.{place}" in str(refused.value)


@pytest.mark.parametrize(
    ("maps", "place"),
    [
        (Balance(32), "transform[0]: Balance is followed by codes of single numbers"),
        (Rotate("hadamard", heads=2), "transform[0].heads: tables of vectors are a head's own"),
        ((PreRope(), Rotate("hadamard")), "transform[1]: behind PreRope() vectors are of all channels"),
    ],
)
def test_what_is_refused_before_sums(maps: Transform | tuple[Transform, ...], place: str) -> None:
    with pytest.raises(SchemeError) as refused:
        Scheme(keys=Store(Additive(8, stages=2), scale=RMS, transform=maps), values=Store())
    assert f"keys.{place}" in str(refused.value)


def test_what_is_refused_at_a_shape() -> None:
    found = [
        str(fault) for fault in shape_faults(Scheme(both=Store(Additive(8, stages=2), scale=RMS)), kvdsl.Shape(40, 1))
    ]
    assert found and all("16 channels at a time at least, and these do not divide head_dim 40" in one for one in found)
