"""Queries that are rounded before they meet packed keys: the reference against torch's own float8, and what is refused.

That kernels do the same is asked by the laws, of shipped schemes and of random ones.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import kvdsl
from kvdsl import reference
from kvdsl.errors import SchemeError
from kvdsl.matrices import rotation
from kvdsl.rules import shape_faults
from kvdsl.scheme import (
    Additive,
    ChannelShift,
    Float,
    LowRank,
    PreRope,
    Recent,
    Rotate,
    Scheme,
    Sinks,
    Sketch,
    Store,
    Tier,
    TopChannels,
    Uniform,
    per_channel,
    per_tensor,
    per_token,
)
from kvdsl.schemes import ALL, mxfp8, mxfp8_queries, ultraquant4
from kvdsl.shape import Shape
from kvdsl.testing import LAWS, Case

E4M3 = Store(Float("e4m3"))
EVEN = Store(Uniform(4), scale=per_token())


def e4m3(x: Tensor) -> Tensor:
    """Rounded to nearest even by torch, saturating."""
    return x.float().clamp(-448, 448).to(torch.float8_e4m3fn).double()


def tensors(queries: int = 3) -> tuple[Tensor, Tensor]:
    """Queries, some of them beyond 448, and keys: of two query heads and one kv head of 64 channels."""
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(1, 2, queries, 64, generator=generator) * torch.tensor([1.0, 30.0, 400.0])[:queries, None]
    return q, torch.randn(1, 1, 12, 64, generator=generator)


def decoded(scheme: Scheme, k: Tensor) -> Tensor:
    return reference.roundtrip(scheme, k, k, window=False)[0][0, 0]


def test_ultraquant_rounds_what_its_matrix_makes_of_a_query() -> None:
    """Under no scale, behind the same Hadamard matrix as keys: large queries saturate."""
    q, k = tensors()
    turn = rotation("hadamard", 64, None, 64)
    met = e4m3(q.double() @ turn.T)
    assert met.abs().max() == 448
    want = met @ (decoded(ultraquant4, k) @ turn.T).T
    assert torch.allclose(reference.scores(ultraquant4, q, k), want, rtol=1e-6, atol=1e-5)


def test_mxfp8_codes_queries_as_it_codes_keys() -> None:
    """Groups of 32 channels under the least power of two that nothing saturates under; keys are those of mxfp8."""
    q, k = tensors()
    groups = q.unflatten(-1, (2, 32))
    scale = torch.exp2(torch.ceil(torch.log2(groups.abs().amax(-1, keepdim=True) / 448)))
    met = (e4m3(groups / scale) * scale).flatten(-2)
    assert torch.equal(decoded(mxfp8, k), decoded(mxfp8_queries, k))
    want = met @ decoded(mxfp8, k).T
    assert torch.allclose(reference.scores(mxfp8_queries, q, k), want, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(reference.scores(mxfp8, q, k), want, rtol=1e-3)


@pytest.mark.parametrize("backend", [None, "torch"])
def test_exact_keys_meet_queries_as_they_are(backend: Any) -> None:
    """Sinks and the window, whatever the form; and so do all in a prompt's own step."""
    scheme = Scheme(both=EVEN, queries=E4M3, sinks=Sinks(2), recent=Recent(3))
    q, k = tensors(1)
    found = reference.scores(scheme, q, k) if backend is None else kvdsl.scores(scheme, q, k, backend=backend)
    plain, rounded = (x.double() @ k[0, 0].double().T for x in (q, e4m3(q)))
    exact = torch.tensor([0, 1, 9, 10, 11])
    assert torch.allclose(found[..., exact].double(), plain[..., exact], atol=1e-4)
    packed = e4m3(q) @ decoded(scheme, k).T
    assert torch.allclose(found[..., 2:9].double(), packed[..., 2:9], atol=1e-4)
    assert (plain - rounded)[..., exact].abs().min() > 1e-3


def test_what_a_shift_adds_to_scores_is_of_the_query_itself() -> None:
    shifted = Scheme(keys=EVEN.with_(transform=ChannelShift()), values=EVEN, queries=E4M3)
    q, k = tensors(1)
    v = torch.randn(1, 64, generator=torch.Generator().manual_seed(2))
    held = reference.roundtrip(shifted, k, k, window=False, params={"keys.transform[0]": v})[0][0, 0]
    want = e4m3(q) @ (held - v).T + (q.double() * v).sum(-1, keepdim=True)
    for found in (reference.scores(shifted, q, k, params={"keys.transform[0]": v}),
                  kvdsl.scores(shifted, q, k, params={"keys.transform[0]": v}, backend="torch")):  # fmt: skip
        assert torch.allclose(found.double(), want, atol=1e-4)


def test_a_number_that_is_none_spoils_its_group() -> None:
    """Under no scale it is e4m3's own, and the score NaN; under one the group is."""
    q, k = tensors(2)
    q[0, 0, 0, 3] = torch.nan
    for scheme in (mxfp8_queries, Scheme(both=EVEN, queries=E4M3)):
        found = kvdsl.scores(scheme, q, k, backend="torch")
        assert found[0, 0, 0].isnan().all() and not found[0, 1:].isnan().any() and not found[0, 0, 1].isnan().any()


@pytest.mark.parametrize("law", ["scores_are_products", "decoding_once_is_attention"])
def test_sums_of_vectors_meet_rounded_queries(law: str) -> None:
    """Numbers that are decoded in the loop, in heads of 48 channels, as whole rows."""
    keys = Store(Additive(3, stages=3), scale=per_token())
    scheme = Scheme(keys=keys, values=EVEN, queries=Store(Uniform(8), scale=per_token(range="absmax")))
    LAWS[law](Case(scheme, Shape(48, 1, 2), "torch", tokens=70, seed=3))


REFUSED: dict[str, dict[str, Any]] = {
    "queries: Float('e4m3') is a Float, not a Store": {"queries": Float("e4m3")},
    "queries.code: fp16 rounds no more": {"queries": Store()},
    "queries.code: a query is rounded to numbers": {"queries": Store(Sketch(64))},
    "queries.scale: evenly spaced levels need a scale": {"queries": Store(Uniform(8))},
    "queries.scale.range: the scale of a query is of its largest": {"queries": EVEN},
    "queries.scale.block: queries come one by one": {"queries": Store(Float("e4m3"), scale=per_channel(tokens=32))},
    "no power of two; use 16 or ALL": {"queries": Store(Float("e4m3"), scale=per_token(channels=24))},
    "queries.scale.when: a query is rounded by its own": {
        "queries": Store(Float("e4m3"), scale=per_tensor(when="calibrated"))
    },
    "queries.scale.clip: nothing is searched": {"queries": Store(Float("e4m3"), scale=per_token(clip=(1.0, 0.9)))},
    "queries.scale.refit: the scale": {"queries": Store(Float("e4m3"), scale=per_token(refit="norm"))},
    "queries.transform: a query goes through": {"queries": E4M3.with_(transform=Rotate())},
    "queries: what is measured of a tier": {"queries": E4M3, "tiers": (Tier(4),)},
    "queries: keys before RoPE": {"queries": E4M3, "keys": EVEN.with_(transform=PreRope())},
    "queries: keys with outliers are sums": {"queries": E4M3, "keys": EVEN.with_(outliers=TopChannels(8))},
    "queries: keys with a residual are sums": {"queries": E4M3, "keys": EVEN.with_(residual=Sketch())},
    "queries: a sketch is right in the mean": {"queries": E4M3, "keys": Store(Sketch())},
    "queries: vectors of low rank": {"queries": E4M3, "keys": Store(LowRank(2)), "recent": Recent(64)},
    "queries: of 2 heads": {"queries": E4M3, "keys": EVEN.with_(transform=Rotate(heads=2))},
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_no_query_can_be_rounded_to_or_for_is_refused(said: str) -> None:
    with pytest.raises(SchemeError) as raised:
        Scheme(**{"keys": EVEN, "values": EVEN} | REFUSED[said])
    assert said in str(raised.value) and len(raised.value.faults) == 1


def test_groups_divide_a_head_and_heads_are_narrow_enough() -> None:
    wide = ALL["mla_fp8"].with_(queries=E4M3)
    assert [fault.place for fault in shape_faults(wide, Shape(576, 1, 3))] == ["queries"]
    (fault,) = shape_faults(Scheme(both=EVEN, queries=mxfp8.keys), Shape(80, 1, 2))
    assert (fault.place, fault.mend) == ("queries.scale.block.channels", "use 16 or ALL")


def test_text_holds_queries() -> None:
    for scheme in (ultraquant4, mxfp8_queries):
        assert Scheme.from_toml(scheme.to_toml()) == scheme == Scheme.from_json(scheme.to_json())
        assert scheme.hash != scheme.with_(queries=None).hash
