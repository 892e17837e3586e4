"""Block-GTQ: orders of rotary pairs by energy, stretches that are shares of a head, and a rotation within each."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kvdsl
from kvdsl import params, reference
from kvdsl.errors import SchemeError, ShapeError
from kvdsl.matrices import rotation
from kvdsl.pair_bits import allotted, energies
from kvdsl.rules import refuse_for
from kvdsl.scheme import Bands, Codebook, Permute, PreRope, Rotate, Scheme, Store, Uniform, per_token
from kvdsl.schemes import block_gtq_k2v2, block_gtq_k3v2, block_gtq_k3v3
from kvdsl.shape import Shape

ORDER = "keys.transform[0]"


def falling(tokens: int, dim: int, ratio: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values of two kv heads, queries of four: pairs i and i + D/2, in an order of each head's own, are each
    `ratio` times as large as the one before."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [ratio ** torch.randperm(dim // 2, generator=generator).float().repeat(2) for _ in range(2)]
    k, v = (torch.randn(1, 2, tokens, dim, generator=generator) for _ in range(2))
    q = torch.randn(1, 4, tokens, dim, generator=generator)
    each = torch.stack(sizes)[None, :, None]
    return k * each, v, q * each.repeat_interleave(2, 1)


@pytest.mark.parametrize(
    ("scheme", "dim", "keys", "values"),
    [
        (block_gtq_k2v2, 128, 2 + 3 * 16 / 128, 2 + 16 / 128),
        (block_gtq_k3v2, 128, 3 + 3 * 16 / 128, 2 + 16 / 128),
        (block_gtq_k3v3, 64, 3 + 3 * 16 / 64, 3 + 16 / 64),
    ],
)
def test_bits_are_the_mean_of_the_quotas_and_a_norm_a_group(
    scheme: Scheme, dim: int, keys: float, values: float
) -> None:
    """No group takes more than its bits, and a page is as large as it is said to be."""
    counted = kvdsl.bits(scheme, head_dim=dim)
    assert (counted.keys, counted.values) == (keys, values)
    tokens = reference.page_tokens(scheme)
    assert 8 * reference.page_bytes(scheme, Shape(dim, 1)) == tokens * dim * (keys + values)


@pytest.mark.parametrize("pairs", ["halves", "neighbours"])
def test_pairs_stay_together_and_rise_by_the_energy_of_keys_and_queries(pairs: Any) -> None:
    k, v, q = falling(50, 32, 0.8)
    q[:, 2:, :, [3, 19]] += 40  # of the second kv head's queries alone
    store = Store(Uniform(4), scale=per_token(), transform=Permute("energy", pairs=pairs))
    order = kvdsl.calibrate(Scheme(keys=store, values=Store()), k, v, q)[ORDER].long()
    for head in range(2):
        first, second = order[head].unflatten(0, (-1, 2)).mT
        assert torch.equal(second, first + 16 if pairs == "halves" else first ^ 1)
        assert sorted(order[head].tolist()) == list(range(32))
        of_keys, of_queries = (x.double().square().flatten(0, -2).mean(0) for x in (k[0, head], q[0, 2 * head :][:2]))
        each = (of_keys + of_queries) / 2
        energy = each[first] + each[second]
        assert bool((energy.diff() >= 0).all())
    if pairs == "halves":
        assert order[1, -2:].tolist() == [3, 19] and order[0, -2:].tolist() != [3, 19]


def test_the_other_measures_sort_pairs_too() -> None:
    """A pair of neighbours has the sum of their ranges; without pairs every channel goes by its own."""
    x = (torch.tensor([0.0, 1.0])[:, None] * torch.tensor([16.0, *range(1, 32)]))[None, None]
    one, pair = (Permute("range"), Permute("range", pairs="neighbours"))
    orders = [
        kvdsl.calibrate(Scheme(keys=Store(transform=part), values=Store()), x, x)[ORDER][0].tolist()
        for part in (one, pair)
    ]
    ranges = x[0, 0, 1].tolist()
    assert orders[0] == sorted(range(32), key=lambda i: ranges[i])
    expected = sorted(range(16), key=lambda i: ranges[2 * i] + ranges[2 * i + 1])
    assert orders[1] == [channel for i in expected for channel in (2 * i, 2 * i + 1)]


@pytest.mark.parametrize("dim", [64, 128])
def test_falling_energies_are_coded_better_than_with_equal_bits(dim: int) -> None:
    """Relative errors of scores, beside groups of as many channels with 2 bits each: of as many bits together."""
    k, v, q = falling(96, dim, 0.5 ** (8 / dim))
    stores = block_gtq_k2v2.keys.code.stores  # type: ignore[union-attr]
    equal = block_gtq_k2v2.with_(**{"keys.code.stores": (stores[1],) * 3})
    assert kvdsl.bits(equal, head_dim=dim).keys == kvdsl.bits(block_gtq_k2v2, head_dim=dim).keys
    right, errors = q.double() @ k.double().repeat_interleave(2, 1).mT, []
    for scheme in (block_gtq_k2v2, equal):
        given = kvdsl.calibrate(scheme, k, v, q)
        errors.append((reference.scores(scheme, q, k, params=given) - right).norm() / right.norm())
    assert errors[0] < 0.65 * errors[1]


def test_groups_keep_their_norms_and_do_not_meet() -> None:
    """Of what is coded each stretch is a rotation of the channels in its place of the order, and as long as they are;
    decoded, it is so, too, as far as fp16 tells (norm correction).  A vector of zeros stays one."""
    k, v, q = falling(40, 64, 0.9)
    k[:, :, 7] = 0
    scheme = block_gtq_k3v3
    given = kvdsl.calibrate(scheme, k, v, q)
    order = given[ORDER].long()[None, :, None].expand_as(k)
    coded = reference.encoded_rows(scheme.keys, k, given)
    decoded = reference.roundtrip(scheme, k, v, params=given)[0]
    for x, tolerance in ((coded, 1e-5), (decoded.gather(3, order), 2.0**-10)):
        for got, own in zip(x.split((16, 32, 16), -1), k.gather(3, order).split((16, 32, 16), -1), strict=True):
            assert torch.allclose(got.double().norm(dim=-1), own.double().norm(dim=-1), rtol=tolerance)
    assert not decoded[:, :, 7].any()


def test_a_rotation_of_several_sizes_is_a_block_of_each_from_the_next_seed() -> None:
    whole = rotation("orthogonal", (0.25, 0.5, 0.25), 5, 64)
    blocks = [rotation("orthogonal", size, 5 + i) for i, size in enumerate((16, 32, 16))]
    assert torch.equal(whole, torch.block_diag(*blocks)) and not torch.equal(blocks[0], blocks[2])
    assert torch.equal(whole, rotation("orthogonal", (16, 32, 16), 5))


def test_text_tells_numbers_behind_the_map_from_channels() -> None:
    """Of stretches behind a map a decoded number is one of y, not of a key."""
    text = " ".join(kvdsl.build(block_gtq_k2v2, Shape(64, 1), "torch").source.split())
    assert "keys, numbers from 16 on: y[t, d] = l[t, d]*s[t, g]" in text and "k[t, d] = l[t, d]" not in text


def test_a_spec_with_shares_is_a_file_and_back_and_the_same() -> None:
    for scheme in (block_gtq_k2v2, block_gtq_k3v2):
        assert Scheme.from_toml(scheme.to_toml()) == scheme == Scheme.from_json(scheme.to_json())


def test_numbers_are_calibrated_with_queries_for_this_scheme(tmp_path: Path) -> None:
    """Without an order nothing says which pairs have more bits; a file of other quotas is another scheme's."""
    k, v, q = falling(40, 64, 0.9)
    with pytest.raises(
        ShapeError, match=r"keys.transform\[0\].*missing; it is calibrated.*calibrate\(scheme, k, v, q\)"
    ):
        kvdsl.roundtrip(block_gtq_k2v2, k, v)
    with pytest.raises(ShapeError, match="q: missing; an order by energy is of the queries that meet the keys"):
        kvdsl.calibrate(block_gtq_k2v2, k, v)
    path = tmp_path / "numbers.safetensors"
    params.save(path, block_gtq_k2v2, kvdsl.calibrate(block_gtq_k2v2, k, v, q))
    assert params.load(path, block_gtq_k2v2).keys() == {ORDER}
    with pytest.raises(ShapeError, match=f"belongs to scheme {block_gtq_k2v2.hash}, not to {block_gtq_k3v2.hash}"):
        params.load(path, block_gtq_k3v2)


GROUPS = Bands((Store(Codebook(1, "normal"), scale=per_token()),) * 2, channels=(0.5, 0.5))
SPECS: list[tuple[str, Store]] = [
    ("code.channels: 0.25 and 0.5 are 0.75 of a head together", Store(GROUPS.with_(channels=(0.25, 0.5)))),
    ("code.channels\\[1\\]: 32.0 is no share of channels", Store(GROUPS.with_(channels=(0.5, 32.0)))),
    ("stretches of channels have none behind PreRope", Store(GROUPS, transform=PreRope())),
    ("'energy' is of keys and of the queries", Store(transform=(PreRope(), Permute("energy")))),
    ("transform\\[0\\].size: 2 heads are rotated", Store(transform=Rotate("orthogonal", (16, 16), 2, 0))),
    ("transform\\[0\\].size: a Hadamard rotation needs a power of two, 24", Store(transform=Rotate(size=(24, 8)))),
]  # fmt: skip


@pytest.mark.parametrize(("said", "keys"), SPECS)
def test_what_is_refused(said: str, keys: Store) -> None:
    with pytest.raises(SchemeError, match=said):
        Scheme(keys=keys, values=Store())


def test_what_a_shape_refuses() -> None:
    with pytest.raises(SchemeError, match="0.25 of head_dim 80 are no multiple of 8 channels"):
        refuse_for(block_gtq_k2v2, Shape(80, 1))
    with pytest.raises(SchemeError, match="blocks of 16 and 32 channels are not head_dim 64"):
        refuse_for(Scheme(keys=Store(transform=Rotate("orthogonal", (16, 32), seed=0)), values=Store()), Shape(64, 1))
    with pytest.raises(SchemeError, match="values.transform.*'energy' is of keys"):
        Scheme(keys=Store(), values=Store(transform=Permute("energy")))


def test_bits_by_energy_leave_the_least_error_of_all() -> None:
    """Of three pairs every choice of 1 to 4 bits with as many together is tried; no head is asked for another's."""
    energy = torch.tensor([[9.0, 1.0, 0.02], [1.0, 1.0, 1.0]])
    found = allotted(energy, 7 / 3, most=4)
    tried = [one for one in itertools.product(range(1, 5), repeat=3) if sum(one) == 7]
    for head, bits in zip(energy, found, strict=True):
        left = [float((head * 4.0 ** -torch.tensor(one)).sum()) for one in tried]
        assert float((head * 4.0**-bits).sum()) == pytest.approx(min(left))
    assert found.tolist() == [[4, 2, 1], [3, 2, 2]]
    with pytest.raises(ValueError, match="bits: 0.5 in the mean of 1 to 8 a pair"):
        allotted(energy, 0.5)


def test_quotas_of_a_layer_make_a_scheme_of_its_own() -> None:
    """Steeply falling energies ask for bits that are far apart; energies are those that an order is by."""
    k, _, q = falling(64, 64, 0.8)
    found = kvdsl.quotas(k, q, 2, most=4)
    assert found == {1: 0.5, 2: 0.25, 4: 0.25} and sum(bits * share for bits, share in found.items()) == 2
    groups = tuple(Store(Codebook(bits, "beta"), scale=per_token(refit="norm")) for bits in found)
    changed = {
        "keys.code": Bands(groups, channels=tuple(found.values())),
        "keys.transform": Permute("energy", pairs="halves"),
    }
    own = block_gtq_k2v2.with_(**changed)
    assert kvdsl.bits(own, head_dim=64).keys == kvdsl.bits(block_gtq_k2v2, head_dim=64).keys
    order = kvdsl.calibrate(own, k, k, q)[ORDER].long()
    assert torch.equal(energies(k, q).argsort(-1), order[:, ::2])
    with pytest.raises(ValueError, match="parts: 32 pairs are no whole number of 5 parts"):
        kvdsl.quotas(k, q, 2, parts=5)
    with pytest.raises(ShapeError, match=r"beside keys \(1, 2, 64, 64\) give \(batch, a multiple of 2, queries, 64\)"):
        kvdsl.quotas(k, q[:, :3], 2)


def test_quotas_of_each_head_make_a_table_of_heads_that_errs_less() -> None:
    """One head's energies fall and the other's do not: quotas alike for both are too steep for the one."""
    k, _, q = falling(64, 64, 0.8)
    k[:, 1], q[:, 2:] = falling(64, 64, 1.0)[0][:, 1], falling(64, 64, 1.0)[2][:, 2:]
    each = kvdsl.head_quotas(k, q, 2, most=4)
    assert each == ({1: 0.5, 2: 0.25, 4: 0.25}, {2: 1.0}) and kvdsl.quotas(k, q, 2, most=4) != each[1]
    one = Store(Codebook(2, "beta"), scale=per_token(refit="norm"))
    other = Bands(tuple(one.with_(bits=bits) for bits in each[0]), channels=tuple(each[0].values()))
    flat = Scheme(both=one)
    falls = Scheme(keys=Store(other, transform=Permute("energy", pairs="halves")), values=one)

    def lost(scheme: Scheme) -> float:
        got = kvdsl.roundtrip(scheme, k, k, params=kvdsl.calibrate(scheme, k, k, q), backend="torch")[0] - k
        return (q.unflatten(1, (2, -1)).double() @ got.double().mT[:, :, None]).square().mean().item()

    both = lost(flat.with_(heads={0: falls}))
    assert both < lost(falls) and both < lost(flat)
