"""Ranges that end at a quantile of sizes, and bases of eigenvectors: what OSCAR is made of."""

from __future__ import annotations

import pytest
import torch

import kvdsl
from kvdsl import reference
from kvdsl.errors import SchemeError, ShapeError
from kvdsl.matrices import rotation
from kvdsl.reference.quantize import encoded_rows
from kvdsl.scheme import Codebook, Eigenbasis, PreRope, Scheme, Store, Uniform, per_channel, per_token
from kvdsl.schemes.oscar import oscar2, oscar2_layer


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_range_ends_at_the_size_of_its_rank() -> None:
    """Of 32 numbers the sizes from rank 28 on are coded as the one there, the smallest of equals counting once each."""
    row = torch.arange(32.0) - 8
    row[31], row[30] = 1000, 19  # sizes rise 0, 1, 1, ..., 18, 19, 19, 20, 21, 1000
    store = Store(Uniform(8, rounding="half_up"), scale=per_token(range="absmax", quantile=28 / 32))
    got = reference.quantize(store, row.reshape(1, 1, 1, 32))
    assert got.scale is not None and got.scale.item() == torch.tensor(19 / 127).half().item()
    assert (got.decoded.flatten() - row.clamp(max=19)).abs().max() < 0.1
    lost = reference.quantize(store.with_(quantile=31 / 32), row.reshape(1, 1, 1, 32)).decoded
    assert lost.flatten()[31] == pytest.approx(1000, abs=1)


@pytest.mark.parametrize("scale", [per_token(quantile=0.9), per_channel(tokens=32, quantile=0.75)])
def test_packed_ranges_end_where_the_definition_says(scale: object) -> None:
    """Ties and zeros among the sizes: a few numbers of few values."""
    x = normal(1, 2, 64, 64, seed=2).mul(2).round().half()
    scheme = Scheme(both=Store(Uniform(2), scale=scale), recent=kvdsl.Recent(32))  # type: ignore[arg-type]
    for packed, defined in zip(
        kvdsl.roundtrip(scheme, x, x, window=False), reference.roundtrip(scheme, x, x, window=False), strict=True
    ):
        assert torch.equal(packed.double(), defined)


def test_a_quantile_of_what_has_no_ends_is_refused() -> None:
    with pytest.raises(SchemeError, match="scale.quantile: norm is of all numbers, and has no ends"):
        Scheme(both=Store(Codebook(2, "normal"), scale=per_token(quantile=0.9)))
    with pytest.raises(SchemeError, match="scale.quantile: 1.0 is no share of a block's numbers; use a share below 1"):
        Scheme(both=Store(Uniform(2), scale=per_token(quantile=1.0)))


def data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys, values and queries of two kv heads whose channels are of other sizes each, turned."""
    sizes = torch.linspace(1, 4, 32) * torch.tensor([1.0, 2.0]).reshape(2, 1, 1)
    turn = rotation("orthogonal", 32, 5).float()
    k, v = (normal(1, 2, 200, 32, seed=seed) * sizes @ turn for seed in (1, 2))
    q = (normal(1, 2, 2, 200, 32, seed=3) * sizes[:, None].flip(-1) @ turn).flatten(1, 2)
    return k, v, q


def moment(x: torch.Tensor) -> torch.Tensor:
    rows = x.double().transpose(0, 1).flatten(1, 2)
    return rows.mT @ rows


def test_a_basis_makes_the_moment_of_queries_diagonal_and_falling() -> None:
    k, v, q = data()
    scheme = Scheme(both=Store(Uniform(2), scale=per_token(), transform=Eigenbasis()))
    given = kvdsl.calibrate(scheme, k, v, q)
    basis = given["keys.transform[0]"].double()
    turned = basis @ moment(q.unflatten(1, (2, 2)).flatten(2, 3)) @ basis.mT
    lengths = turned.diagonal(dim1=1, dim2=2)
    assert (turned - torch.diag_embed(lengths)).abs().max() < 1e-5 * lengths.max()
    assert (lengths.diff() <= 0).all()
    # of values: each weighted by what the queries make of its key
    rows, queries = k.double()[0], moment(q.unflatten(1, (2, 2)).flatten(2, 3))
    weight = ((rows @ queries) * rows).sum(-1).sqrt()
    basis = given["values.transform[0]"].double()
    turned = basis @ moment(v * weight[None, ..., None]) @ basis.mT
    lengths = turned.diagonal(dim1=1, dim2=2)
    assert (turned - torch.diag_embed(lengths)).abs().max() < 1e-5 * lengths.max()


def test_a_basis_of_a_layer_is_one_for_all_heads() -> None:
    k, v, q = data()
    own, shared = (kvdsl.calibrate(scheme.with_(sinks=None), k, v, q) for scheme in (oscar2, oscar2_layer))
    assert own["keys.transform[0]"].shape == (2, 32, 32) and shared["keys.transform[0]"].shape == (1, 32, 32)
    store = oscar2_layer.values.with_(transform=Eigenbasis(per="layer"))
    y = encoded_rows(store, v, {"values.transform[0]": shared["values.transform[0]"]}, "values")
    assert torch.allclose(y.norm(dim=-1), v.norm(dim=-1), rtol=1e-5)


def test_a_basis_that_is_not_given_or_none_is_refused() -> None:
    k, v, q = data()
    with pytest.raises(ShapeError, match="q: missing; a basis by attention"):
        kvdsl.calibrate(oscar2.with_(sinks=None), k, v)
    given = kvdsl.calibrate(oscar2.with_(sinks=None), k, v, q)
    with pytest.raises(ShapeError, match="keys.transform\\[0\\].*are off by 3 from those of a rotation"):
        kvdsl.roundtrip(oscar2, k, v, params=given | {"keys.transform[0]": 2 * given["keys.transform[0]"]})
    with pytest.raises(ShapeError, match="calibrate\\(scheme, k, v, q\\)"):
        kvdsl.roundtrip(oscar2, k, v)
    with pytest.raises(SchemeError, match="'attention' is of the queries that meet keys.*use 'own'"):
        turned = Store(Uniform(2), scale=per_token(), transform=(PreRope(), Eigenbasis()))
        Scheme(keys=turned, values=Store())


def test_reversed_bits_put_every_eigenvector_far_from_its_neighbours() -> None:
    assert rotation("bit_reversal", 8).argmax(1).tolist() == [0, 4, 2, 6, 1, 5, 3, 7]
    with pytest.raises(SchemeError, match="nothing of a bit_reversal rotation is drawn"):
        Scheme(both=Store(Uniform(2), scale=per_token(), transform=kvdsl.Rotate("bit_reversal", seed=0)))


def test_a_prompt_within_sinks_and_window_is_exact_and_the_next_token_is_not() -> None:
    """64 sinks and 256 recent tokens: of 321 one is packed, that behind the sinks."""
    k, v, q = normal(1, 1, 321, 32, seed=7), normal(1, 1, 321, 32, seed=8), normal(1, 1, 9, 32)
    given = kvdsl.calibrate(oscar2, k, v, q)
    short = kvdsl.roundtrip(oscar2, k[:, :, :320], v[:, :, :320], params=given)
    whole = kvdsl.roundtrip(oscar2, k, v, params=given)
    for x, exact, packed in zip((k, v), short, whole, strict=True):
        assert torch.equal(exact, x[:, :, :320])
        assert (packed != x).any(-1).flatten().nonzero().flatten().tolist() == [64]
