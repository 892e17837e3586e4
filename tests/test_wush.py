"""Maps that balance two moments and are no rotations: what WUSH-KV is made of."""

from __future__ import annotations

import pytest
import torch

import kvdsl
from kvdsl.errors import SchemeError, ShapeError
from kvdsl.matrices import rotation
from kvdsl.scheme import Eigenbasis, PreRope, Scheme, Store, Uniform, per_token

PLAIN = Store(Uniform(2), scale=per_token())
SCHEME = Scheme(keys=PLAIN.with_(transform=Eigenbasis("balanced")), values=PLAIN)


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Keys of two kv heads, long where the queries of two heads each are short."""
    draw = torch.Generator().manual_seed(0)
    sizes, turn = torch.linspace(0.2, 4, 32), rotation("orthogonal", 32, 5).float()
    keys = torch.randn(1, 2, 400, 32, generator=draw) * sizes @ turn
    return keys, torch.randn(1, 4, 400, 32, generator=draw) * sizes.flip(-1).sqrt() @ turn


def moment(x: torch.Tensor) -> torch.Tensor:
    rows = x.double().transpose(0, 1).flatten(1, 2)
    return rows.mT @ rows


def test_keys_and_the_queries_that_meet_them_have_one_moment_diagonal_and_falling() -> None:
    k, q = data()
    there, back = kvdsl.calibrate(SCHEME, k, k, q)["keys.transform[0]"].double().unbind(1)
    met = moment(q.unflatten(1, (2, 2)).flatten(2, 3))
    own, other = there @ moment(k) @ there.mT, back.mT @ met @ back
    lengths = own.diagonal(dim1=1, dim2=2)
    assert (own - torch.diag_embed(lengths)).abs().max() < 1e-3 * lengths.max() and (lengths.diff() <= 0).all()
    ratio = lengths / other.diagonal(dim1=1, dim2=2)  # one number a head, as y is as long as x
    assert (ratio / ratio[:, :1] - 1).abs().max() < 0.02
    assert lengths.sum(-1) == pytest.approx(moment(k).diagonal(dim1=1, dim2=2).sum(-1), rel=1e-3)


def test_scores_err_less_than_behind_a_rotation() -> None:
    k, q = data()

    def lost(scheme: Scheme) -> float:
        got, _ = kvdsl.roundtrip(scheme, k, k, params=kvdsl.calibrate(scheme, k, k, q), window=False)
        return float((q.unflatten(1, (2, 2)) @ (got - k)[:, :, None].mT).square().mean())

    assert lost(SCHEME) < 0.7 * lost(SCHEME.with_(**{"keys.transform": Eigenbasis()}))


def test_a_layer_has_one_pair_and_few_keys_do() -> None:
    """Five keys span five directions of 32: the others are damped, and nothing is divided by zero."""
    k, q = data()
    shared = SCHEME.with_(**{"keys.transform": Eigenbasis("balanced", per="layer")})
    given = kvdsl.calibrate(shared, k[:, :, :5], k[:, :, :5], q)
    assert given["keys.transform[0]"].shape == (1, 2, 32, 32)
    assert all(torch.isfinite(x).all() for x in kvdsl.roundtrip(shared, k, k, params=given))


def test_what_is_no_map_and_its_inverse_is_refused() -> None:
    k, q = data()
    given = kvdsl.calibrate(SCHEME, k, k, q)
    with pytest.raises(ShapeError, match=r"keys.transform\[0\].*are off by .* from those of a map and its inverse"):
        kvdsl.roundtrip(SCHEME, k, k, params={"keys.transform[0]": given["keys.transform[0]"].flip(1) * 2})
    with pytest.raises(ShapeError, match="q: missing; a basis by balanced"):
        kvdsl.calibrate(SCHEME, k, k)
    with pytest.raises(SchemeError, match="'balanced' is of the queries that meet keys.*use 'own'"):
        Scheme(keys=PLAIN.with_(transform=(PreRope(), Eigenbasis("balanced"))), values=Store())
