"""Caches of tiers: their laws, asked of random schemes, and what saliency, decisions and flushes are by hand."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from law_cases import TIER_LAWS, fixed
from torch import Tensor

from kvdsl.errors import SchemeError
from kvdsl.reference import RoutedStream
from kvdsl.reference.choices import Choice, grown
from kvdsl.reference.saliency import Received, importance
from kvdsl.rules import shape_faults
from kvdsl.scheme import (
    ALL,
    DROP,
    ChannelScale,
    Largest,
    Origin,
    Probes,
    Recent,
    Router,
    Saliency,
    Scheme,
    Sinks,
    Store,
    Tier,
    Uniform,
    per_channel,
    per_token,
)
from kvdsl.shape import Shape
from kvdsl.testing import LAWS, Case, LawBroken, cases, check, report, routed_schemes, shapes
from kvdsl.testing.tier_driving import Run, tier_kernels
from kvdsl.tiered_cache import TieredCache
from kvdsl.tiers import Metric

FOUR = Store(Uniform(4), scale=per_token())
TWO_TIERS = (Tier(4, top=0.5), Tier(2))


# -- the laws ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", TIER_LAWS)
@fixed(examples=5)
@given(st.data())
def test_any_scheme_with_tiers_obeys_the_law(law: str, data: Any) -> None:
    scheme: Scheme = data.draw(routed_schemes(longest=24).filter(LAWS[law].applies))
    some = [Shape(32, 2, 4), Shape(64, 1, 3, "bf16", placed=True), Shape(32, 2, 2, "fp32", True)]
    some += [replace(some[0], placed=True), replace(some[2], placed=True)]
    shape = data.draw(st.sampled_from([shape for shape in some if not shape_faults(scheme, shape)]))
    LAWS[law](data.draw(cases(scheme, shape, "torch", kinds=LAWS[law].kinds, batch=2, most=90)))


@fixed(examples=3)
@given(st.data())
def test_any_shape_that_a_scheme_with_tiers_fits(data: Any) -> None:
    scheme: Scheme = data.draw(routed_schemes())
    case = data.draw(cases(scheme, data.draw(shapes(scheme, widest=96)), "torch", kinds=("normal",), batch=2))
    LAWS["tiers_hold_what_is_defined"](case)


LATER = Saliency("mean_std", probes=None, every=3, later="last")
DOWN = Saliency("accumulated", moves="down")
ONCE = FOUR.with_(transform=(ChannelScale("absmax", when="prompt"),))
FOUND: dict[str, Scheme] = {
    "what goes down is given back what was measured": Scheme(both=ONCE, tiers=TWO_TIERS, router=DOWN),
    "the prompt's measure outlasts flushes": Scheme(
        both=ONCE, tiers=TWO_TIERS, router=DOWN.with_(moves="any"), requantize="on_flush"
    ),
    "the newest query alone, behind a prompt of which all were asked": Scheme(
        both=FOUR, tiers=TWO_TIERS, router=LATER, recent=Recent(5)
    ),
    "old tokens take no place among the steady": Scheme(
        both=FOUR, tiers=TWO_TIERS, router=LATER.with_(later=None), requantize="on_flush", recent=Recent(3)
    ),
    "queries of chunks that are not as long for all": Scheme(
        both=FOUR, tiers=TWO_TIERS, router=Saliency("normalized", every=20, later="mean", probes=Probes(recent=5)),
    ),
    "queries that are padding balance nothing": Scheme(
        keys=FOUR.with_(transform=(ChannelScale("balance", when="prompt"),)), values=FOUR, tiers=TWO_TIERS, router=DOWN
    ),
    "roots of channel sizes": Scheme(
        keys=FOUR, values=FOUR.with_(transform=(ChannelScale(when="online"),)), requantize="on_flush"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_a_scheme_that_once_broke_the_definitions(name: str) -> None:
    for seed in range(3):
        case = Case(FOUND[name], Shape(32, 2, 6), "torch", batch=3, tokens=77, seed=seed)
        LAWS["tiers_hold_what_is_defined"](case)


def test_a_scheme_with_tiers_is_asked_the_laws_of_tiers_alone() -> None:
    scheme = Scheme(both=FOUR, tiers=TWO_TIERS, router=Largest(every=8), recent=Recent(8))
    found = [result.law for result in check(scheme, backend="torch", examples=1)]
    assert found and set(found) <= set(TIER_LAWS)


def test_a_quota_that_is_one_off_breaks_a_law(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvdsl import routing
    from kvdsl.tier_shares import targets as right

    monkeypatch.setattr(routing, "targets", lambda scheme, routed: (right(scheme, routed)[0] + 1, routed))
    scheme = Scheme(both=FOUR, tiers=TWO_TIERS, router=Largest(every=8))
    broken = [one for one in report(scheme, backend="torch", examples=6) if not one.passed]
    assert {"tiers_hold_what_is_defined", "budgets_hold_at_every_step"} <= {one.law for one in broken}


def test_tokens_of_the_wrong_place_break_a_law(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvdsl.segment_cache import SegmentCache

    right = SegmentCache.append
    wrong = lambda self, tokens, counts, places, sums: right(self, tokens, counts, places.roll(1, 2), sums)  # noqa: E731
    monkeypatch.setattr(SegmentCache, "append", wrong)
    case = Case(
        Scheme(both=FOUR, tiers=(Tier(4), Tier(2)), router=Origin()), Shape(32, 1, 1), "torch", tokens=9, seed=1
    )
    with pytest.raises(LawBroken, match="keys of sequence"):
        LAWS["tiers_hold_what_is_defined"](case)


# -- saliency by hand --------------------------------------------------------------------------------------------------


def uniform(tokens: int) -> Received:
    """What is received where every query gives all tokens that it sees the same."""
    share = 1 / torch.arange(1, tokens + 1, dtype=torch.float64)
    rows = torch.tril(share[:, None].expand(tokens, tokens))
    return Received(rows.sum(0)[None, None], rows.square().sum(0)[None, None], tokens, 1)


def test_normalized_saliency_of_uniform_attention() -> None:
    """P22: over the queries that can see a token, sums lose most of what the first tokens have too much."""
    normal = importance(uniform(100), "normalized")[0, 0]
    assert [round(float(normal[t]), 5) for t in (0, 50, 99)] == [0.05187, 0.01376, 0.01]
    assert round(float(importance(uniform(100), "accumulated")[0, 0, 0]), 3) == 5.187


def test_saliency_is_all_that_queries_give() -> None:
    """P22: over the queries that see them, tokens receive as much as there are queries."""
    q, k = torch.randn(1, 4, 40, 32), torch.randn(1, 2, 40, 32)
    told = RoutedStream(Scheme(both=FOUR, tiers=TWO_TIERS, router=Saliency()))
    told.append(k, k)
    weights = told.scores(q, list(range(40)), None, None).softmax(-1)
    found = importance(told._received(weights, 40), "normalized")
    assert torch.allclose((found * (40 - torch.arange(40))).sum(-1), torch.full((1, 2), 80.0, dtype=torch.float64))


@pytest.mark.parametrize("metric", ["normalized", "accumulated", "mean"])
def test_all_queries_as_probes_are_the_sums_that_are_carried_on(metric: Metric) -> None:
    """P23: of a prompt, whichever way they are asked."""
    q, k, v = (torch.randn(1, heads, 50, 32) for heads in (4, 2, 2))
    found = []
    for probes in (None, Probes(recent=50), Probes(random=50), Probes(recent=7, random=43)):
        router = Saliency(metric, probes=probes)
        told = RoutedStream(Scheme(both=FOUR, tiers=TWO_TIERS, router=router, recent=Recent(4)))
        told.step(q, k, v)
        found.append(told.choices[0].low)
    assert all(torch.allclose(one, found[0], rtol=1e-12) for one in found)


# -- decisions by hand -------------------------------------------------------------------------------------------------


def test_tiers_grow_to_their_quotas_and_never_shrink() -> None:
    tiers = (Tier(8, top=3), Tier(4, top=0.25), Tier(2))
    assert grown(tiers, (0, 0, 0), 8) == (3, 2, 3)
    assert grown(tiers, (3, 2, 3), 1) == (3, 2, 4)
    assert grown(tiers, (3, 2, 4), 3) == (3, 3, 6)
    assert grown((Tier(4, top=0.5), Tier(2)), (2, 0), 1) == (2, 1)


@pytest.mark.parametrize(("moves", "right"), [("new", [0, 1, 0, 1]), ("down", [1, 1, 0, 0]), ("any", [1, 0, 0, 1])])
def test_what_a_decision_may_do(moves: Any, right: list[int]) -> None:
    """Tokens 0 and 1 stand in tiers 0 and 1, 2 and 3 come; both tiers grow to two.  "new" leaves token 0, which is
    worth least, where it is, and only "any" takes token 1 up."""
    worth = torch.tensor([1.0, 4.0, 5.0, 2.0], dtype=torch.float64)[None, None]
    before = torch.tensor([[[0, 1, -1, -1]]])
    choice = Choice(2, 4, before, worth, worth, (2, 2), moves)
    assert choice.labels()[0, 0].tolist() == right
    assert choice.refusal(choice.labels()) == ""
    assert choice.refusal(torch.tensor([[[0, 1, 1, 0]]])) != ""


def test_a_choice_between_tokens_of_nearly_the_same_worth_may_go_either_way() -> None:
    worth = torch.tensor([1.0, 1.001, 0.5], dtype=torch.float64)[None, None]
    before = torch.full((1, 1, 3), -1)
    choice = Choice(0, 3, before, worth * 0.99, worth * 1.01, (1, 2), "new")
    assert [choice.refusal(torch.tensor([[row]])) for row in ([0, 1, 1], [1, 0, 1])] == ["", ""]
    assert "token 2 before token 1" in choice.refusal(torch.tensor([[[1, 1, 0]]]))
    assert "takes 2 of 3" in choice.refusal(torch.tensor([[[0, 0, 1]]]))


@dataclass(frozen=True, repr=False)
class EveryFourth(Router):
    """A user's: every fourth token to the first tier."""

    def labels(self, position: Tensor, prompt: int) -> Tensor:
        return (position % 4 != 0).long()


def test_the_laws_hold_for_a_router_of_a_user() -> None:
    check(Scheme(both=FOUR, sinks=Sinks(2), recent=Recent(9), tiers=(Tier(8), DROP), router=EveryFourth()), examples=3)


def test_a_head_of_its_own_cannot_be_told_from_the_others_of_a_token_that_moves() -> None:
    """Numbers that are given by head, under a router that takes single tokens down."""
    store = Store(Uniform(4), scale=per_channel(tokens=ALL).with_(when="calibrated"))
    with pytest.raises(SchemeError, match="given by head"):
        Scheme(both=store, tiers=TWO_TIERS, router=DOWN)


def test_a_shift_of_all_scores_is_refused_under_a_softcap() -> None:
    scheme = Scheme(both=Store(Uniform(4), scale=per_channel(tokens=ALL)), requantize="on_flush")
    with pytest.raises(SchemeError, match="softcap"):
        tier_kernels(Case(scheme, Shape(32, 1, 1, "fp16", True), "torch"))


# -- cutting -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("router", [Largest(every=16), Saliency("normalized", every=16, probes=Probes(recent=8))])
def test_tokens_that_wait_are_cropped_as_if_they_had_never_come(router: Router) -> None:
    scheme = Scheme(both=FOUR, recent=Recent(8), tiers=TWO_TIERS, router=router)
    case = Case(scheme, Shape(32, 2, 4), "torch", tokens=80)
    plain, cut = Run.of(case), Run.of(case)
    for run in (plain, cut):
        run.step([40])
        if run is cut:
            junk = [torch.randn(1, heads, 5, 32).half() for heads in (4, 2, 2)]
            run.cache.append_and_attend(*junk)
            run.cache.crop(40)
        for size in (1, 20, 19):
            run.step([size])
    assert torch.equal(plain.cache.labels, cut.cache.labels)
    assert torch.equal(plain.rows(0, "keys"), cut.rows(0, "keys"))


# -- flushes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_quantizing_the_same_tokens_again_drifts_by_roundings_alone(
    bits: int, dtype: Any, record_property: Any
) -> None:
    """P3: both ends of a range are codes, so in exact numbers nothing moves; here by the roundings of the scale and of
    decoded rows, one unit of fp16 of the range a flush at most, and 30 flushes move less than that suggests."""
    store = Store(Uniform(bits), scale=per_token(dtype=dtype))
    scheme = Scheme(both=store, requantize="on_flush", recent=Recent(4, "whole"))
    cache = TieredCache(tier_kernels(Case(scheme, Shape(64, 1, 1), "torch")), 1)
    source = torch.Generator().manual_seed(bits)
    first, x = None, torch.randn(1, 1, 32, 64, generator=source).half()
    cache.append(x, x)
    cache.route()
    drifts = []
    for _ in range(30):
        held = cache.dense("keys")[:, :, :32].double()
        first = held if first is None else first
        drifts.append(float((held - first).abs().max()))
        more = torch.randn(1, 1, 4, 64, generator=source).half()
        cache.append(more, more)
        cache.route()
    assert first is not None
    width = float((first.amax(-1) - first.amin(-1)).max())
    record_property("drift", drifts[-1])
    assert drifts[-1] <= len(drifts) * 2.0**-10 * width, drifts
    if dtype == "fp32":
        assert drifts[-1] <= 2 * 2.0**-10 * width, drifts


def test_other_tokens_beside_them_let_tokens_drift() -> None:
    """P3: where a scale is of all tokens, and more come, what stood on its levels does not any more: an error that
    grows with the flushes, and stays below a step of the widest range for each."""
    scheme = Scheme(both=Store(Uniform(4), scale=per_channel(tokens=ALL)), requantize="on_flush")
    source = torch.Generator().manual_seed(1)
    x = torch.randn(1, 1, 96, 32, generator=source)
    cache = TieredCache(tier_kernels(Case(scheme, Shape(32, 1, 1, "fp32"), "torch")), 1)
    errors = []
    for begin in range(0, 96, 16):
        part = x[:, :, begin : begin + 16]
        cache.append(part, part)
        cache.route()
        errors.append(float((cache.dense("keys")[:, :, :16] - x[:, :, :16]).square().mean().sqrt()))
    step = float((x.amax(2) - x.amin(2)).max()) / 15
    assert errors[0] < errors[-1] < len(errors) * step / 2


def test_a_compiled_scheme_with_tiers_has_kernels_for_each() -> None:
    kernels = tier_kernels(Case(Scheme(both=FOUR, tiers=(Tier(4), DROP), router=Origin()), Shape(32, 1, 1), "torch"))
    assert [one is None for one in kernels.tiers] == [False, True]
