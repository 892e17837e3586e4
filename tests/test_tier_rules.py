"""What is refused of tiers and routers, in which words, before any kernel runs; and that nothing is lost then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from tier_cases import SHIPPED, case, short
from torch import Tensor

import kvdsl
from kvdsl.errors import CacheError, SchemeError, ShapeError
from kvdsl.probes import probe_rows
from kvdsl.scheme import (
    DROP,
    ChannelScale,
    Largest,
    Origin,
    PreRope,
    Probes,
    Recent,
    Router,
    Saliency,
    Scheme,
    Store,
    Tier,
    Uniform,
    per_channel,
    per_token,
)
from kvdsl.shape import Shape
from kvdsl.testing import applicable, report
from kvdsl.tiered_cache import TieredCache

FOUR = Store(Uniform(4), scale=per_token())
TWO = (Tier(4, top=0.5), Tier(2))


def tiers(**changes: object) -> Callable[[], Scheme]:
    return lambda: Scheme(**{"both": FOUR, "tiers": TWO, "router": Saliency(), **changes})  # type: ignore[arg-type]


WORDS = [
    (tiers(router=None), 'router: 2 tiers and nothing that sorts tokens into them; add router=Saliency("normalized", '
     "every=100)"),
    (tiers(tiers=()), "router: it has no choice to make without two tiers; add tiers=(Tier(4, top=0.5), Tier(2))"),
    (tiers(tiers=(Tier(4, top=0.7), Tier(3, top=0.5), Tier(2))),
     "tiers: shares add up to 1.2, more than all tokens; make them smaller"),
    (tiers(tiers=(Tier(4), Tier(2))), "tiers[0].top: only the last tier takes the rest; say how many, as top=0.2"),
    (tiers(tiers=(Tier(4, top=0.5), Tier(2, top=3))), "tiers[1].top: the last tier takes the rest; leave top out"),
    (tiers(tiers=(DROP.with_(top=0.5), Tier(2))),
     "tiers[0].bits: tokens that are dropped stand in no order; put the tier that drops last"),
    (tiers(tiers=(Tier(9, top=0.5), Tier(2))), "tiers[0].bits: 9 bits; use 1 to 8, 16 for fp16, or 0 to drop tokens"),
    (tiers(tiers=[1]), "tiers[0]: 1 is an int, not a Tier; write Tier(4, top=0.6)"),
    (tiers(router=Origin()), "tiers[0].top: the router itself says which tokens stand here; leave top out"),
    (tiers(router=Saliency(moves="any")),
     "router.moves: moving a token up needs its bits back; use moves='down', or requantize='on_flush'"),
    (tiers(router=Saliency(every=None)),  # type: ignore[arg-type]
     "router.every: None is no number of tokens; use an int, as 100, or 'prompt'"),
    (tiers(router=Saliency(pool=4)), "router.pool: 4 neighbours have no middle; use 5"),
    (tiers(router=Saliency(probes=Probes(recent=1.5))),
     "router.probes.recent: 1.5 is no share of queries; use a share below 1, as 0.6, or a count, as 1024"),
    (tiers(prefill="stored"), "prefill: tokens are sent to tiers behind the attention of their own step, which sees "
     "them exactly; leave prefill out"),
    (tiers(keys=FOUR, values=FOUR, both=None, requantize="on_flush",
           **{"recent": Recent(8, "whole")}), "recent.flush: a window that leaves at once is a router's `every`; leave "
     "flush out"),
    (lambda: Scheme(keys=FOUR.with_(transform=(PreRope(), ChannelScale(when="prompt"))), values=FOUR, tiers=(Tier(),)),
     "keys.transform[1]: what is measured on a tier's tokens is of the vector itself; put it first"),
    (lambda: Scheme(both=Store(Uniform(4), scale=per_channel()), tiers=(Tier(),)),
     "keys.scale: one scale over all tokens cannot be appended to; use requantize='on_flush', or a group such as "
     "tokens=64\nvalues.scale: one scale over all tokens cannot be appended to; use requantize='on_flush', or a group "
     "such as tokens=64"),
    (lambda: Scheme(both=FOUR.with_(transform=ChannelScale(when="online"))),
     "keys.transform[0].when: 'online' measures the tokens of a tier, and the scheme has none; use 'calibrated', or "
     "add tiers=(Tier(),)"),
    (lambda: Scheme(both=Store(Uniform(2), scale=per_channel(tokens=32)), tiers=TWO, router=Saliency(moves="down")),
     "tiers[0].keys: tokens that share a scale with others cannot leave, or come, alone; use a scale for each token of "
     "a head, or requantize='on_flush'"),
    (lambda: Scheme(both=Store(Uniform(4)), tiers=(Tier(),)),
     "keys.scale: evenly spaced levels need a scale; say what shares one, as scale=per_token(channels=32)"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "sentence"), WORDS)
def test_a_spec_with_tiers_is_refused_in_these_words(make: Callable[[], Scheme], sentence: str) -> None:
    with pytest.raises(SchemeError) as caught:
        make()
    assert sentence in str(caught.value)


@dataclass(frozen=True, repr=False)
class Odd(Router):
    """A router that names a tier that there is not."""

    first: int = 0

    def labels(self, position: Tensor, prompt: int) -> Tensor:
        return position % 3


def data(tokens: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, heads, tokens, 32, generator=generator) for heads in (4, 2, 2))
    return q, k, v


def test_a_user_s_router_is_written_down_and_read_back() -> None:
    """As any part is, once its class is defined; an unknown one is named, never imported."""
    scheme = Scheme(both=FOUR, tiers=(Tier(4), Tier(3), Tier(2)), router=Odd(5))
    assert Scheme.from_toml(scheme.to_toml()) == scheme == Scheme.from_json(scheme.to_json())
    with pytest.raises(SchemeError, match="router.part: 'NoSuch' is no part that can stand here"):
        Scheme.from_toml(scheme.to_toml().replace('"Odd"', '"NoSuch"'))


def test_a_router_s_wrong_answer_is_named() -> None:
    _, k, v = data()
    with pytest.raises(ValueError, match="router: labels 0 to 2; there are tiers 0 to 1"):
        kvdsl.roundtrip(Scheme(both=FOUR, tiers=(Tier(4), Tier(2)), router=Odd()), k, v)


def test_queries_or_labels_are_asked_for() -> None:
    q, k, v = data()
    scheme = tiers()()
    with pytest.raises(ShapeError, match=r"queries: missing; the router goes by attention, give those of all tokens"):
        kvdsl.roundtrip(scheme, k, v)
    with pytest.raises(ShapeError, match="labels: 0 to 2; there are tiers 0 to 1"):
        kvdsl.roundtrip(scheme, k, v, labels=torch.arange(64).expand(1, 2, -1) % 3)
    uneven = torch.zeros(1, 2, 64, dtype=torch.int64)
    uneven[0, 1, 0] = 1
    with pytest.raises(ShapeError, match=r"labels: of sequence 0 heads have \(63, 1\) and \(64, 0\) tokens"):
        kvdsl.roundtrip(scheme, k, v, labels=uneven)
    where = kvdsl.labels(scheme, q, k, v)
    assert all(map(torch.equal, kvdsl.roundtrip(scheme, k, v, labels=where), kvdsl.roundtrip(scheme, k, v, queries=q)))
    with pytest.raises(SchemeError, match="tiers: there are none"):
        kvdsl.labels(Scheme(both=FOUR), q, k, v)


@pytest.mark.parametrize("moves", ["new", "down"])
def test_a_step_that_fails_leaves_the_cache_as_it_was(moves: str) -> None:
    """Pages run out behind the attention: tokens, places and sums are those before the step, which then succeeds in a
    cache that has room."""
    q, k, v = data(200)
    scheme = Scheme(both=FOUR, recent=Recent(4), tiers=TWO, router=Saliency("accumulated", moves=moves))  # type: ignore
    kernels = kvdsl.build_tiers(scheme, Shape(32, 2, 4, "fp32"), "torch")
    small, large = TieredCache(kernels, 1, capacity=64), TieredCache(kernels, 1)
    for cache in (small, large):
        cache.append_and_attend(q[:, :, :100], k[:, :, :100], v[:, :, :100])
    failed = None
    for i in range(100, 200):
        step = [x[:, :, i : i + 1] for x in (q, k, v)]
        state = (small.labels.clone(), waiting_sums(small), small.lengths)
        try:
            small.append_and_attend(*step)
        except CacheError:
            failed = state
            break
        large.append_and_attend(*step)
    assert failed is not None
    assert torch.equal(small.labels, failed[0]) and torch.equal(waiting_sums(small), failed[1])
    assert small.lengths == failed[2] == large.lengths
    assert torch.equal(small.labels, large.labels) and torch.equal(waiting_sums(small), waiting_sums(large))


def waiting_sums(cache: TieredCache) -> Tensor:
    """What is carried on for the tokens that wait."""
    return cache.front.sums[..., cache.front.places(max(cache.front.waiting))[0]]


def test_random_probes_are_right_in_the_mean() -> None:
    """P23: over many seeds each query is asked as often as any other, so that sums over them are, but for the share,
    those of all; with all of them asked they are exact."""
    counts = torch.zeros(40)
    for seed in range(400):
        counts[probe_rows(Probes(random=0.25, seed=seed), 40, 40)] += 1
    assert probe_rows(Probes(recent=40), 40, 40) == list(range(40))
    assert int(counts.sum()) == 400 * 10 and (counts - 100).abs().max() < 5 * (400 * 0.25 * 0.75) ** 0.5
    assert probe_rows(Probes(random=5, seed=3), 40, 40) == probe_rows(Probes(random=5, seed=3), 40, 40)
    assert probe_rows(Probes(), 40, 40) == [39] and probe_rows(Probes(recent=0.05, random=0.05), 256, 256)[-13:] == [
        *range(243, 256)
    ]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_scheme_with_tiers_obeys_every_law(name: str) -> None:
    found = list(report(kvdsl.load(name), backend="torch", examples=2))
    assert len(found) >= 4 and not [one for one in found if not one.passed]
    for law in applicable(short(name)):
        law(case(name, "torch"))


def test_a_sliding_window_asks_for_kernels_that_know_positions() -> None:
    kernels = kvdsl.build_tiers(tiers()(), Shape(32, 2, 4, "fp32"), "torch")
    with pytest.raises(CacheError, match="window: 9 tokens, and the kernels know no positions; build for a shape with"):
        TieredCache(kernels, 1, window=9)
    cache = TieredCache(kernels, 1)
    with pytest.raises(ValueError, match="attention: a sliding window of 9, and the kernels know no positions"):
        cache.tuned(cache.state(), 1.0, None, 9)


def test_largest_tokens_come_first() -> None:
    """Of keys, or values, by the largest channel or the norm; or the smallest ones."""
    _, k, v = data()
    k[0, 0, 5], v[0, 1, 9] = 50.0, 40.0
    tier = (Tier(16, top=1), Tier(2))
    for router, place in ((Largest(), (0, 5)), (Largest("values", "norm"), (1, 9))):
        where = kvdsl.labels(Scheme(both=FOUR, tiers=tier, router=router), k.repeat(1, 2, 1, 1), k, v)
        assert (where == 0).sum(2).tolist() == [[1, 1]] and where[0, *place] == 0
    where = kvdsl.labels(Scheme(both=FOUR, tiers=tier, router=Largest(smallest=True)), k.repeat(1, 2, 1, 1), k, v)
    assert where[0, 0, 5] == 1


def test_bits_accounted_are_bytes_held() -> None:
    """P31: of tiers of whole pages, codes and scales to the byte, and four bytes for each place that a token takes."""
    q, k, v = data(256)
    scheme = Scheme(both=FOUR, tiers=TWO, router=Saliency(probes=Probes(recent=4), every=64))
    cache = TieredCache(kvdsl.build_tiers(scheme, Shape(32, 2, 4, "fp32"), "torch"), 1)
    cache.append_and_attend(q, k, v)
    counted = kvdsl.bits(scheme, 32, 2, tokens=256)
    held = [one for one in cache.tiers if one is not None]
    pages = sum(len(set(one.cache.held())) * one.cache.kernels.page_bytes for one in held)
    places = sum(4 * 2 * sum(one.counts) for one in held)
    assert [one.counts for one in held] == [(128,), (128,)]
    assert 8 * (pages + places) == pytest.approx(counted.mean * 2 * 256 * 2 * 32, abs=1e-6)
