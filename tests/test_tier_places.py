"""Caches of tiers whose tokens are told where they stand: keys before RoPE, and sliding windows; on torch."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from tier_cases import BEFORE_ROPE, FOUR, ROPED, TWO

import kvdsl
from kvdsl.errors import ShapeError
from kvdsl.front import Front
from kvdsl.kernels import Places
from kvdsl.reference import RoutedStream
from kvdsl.reference.saliency import Received
from kvdsl.rope import usual
from kvdsl.saliency import seeing
from kvdsl.scheme import Probes, Recent, Saliency, Scheme, Sinks, Tier
from kvdsl.segment_cache import SegmentCache
from kvdsl.shape import Shape
from kvdsl.testing import LAWS, Case, LawBroken
from kvdsl.testing.tier_driving import Run
from kvdsl.tiered_cache import TieredCache

SHAPE = Shape(32, 2, 4)
WINDOWS = {
    "down": Scheme(both=FOUR, tiers=TWO, router=Saliency(every=5, moves="down"), sinks=Sinks(2), recent=Recent(4)),
    "mean_std": Scheme(both=FOUR, tiers=TWO, router=Saliency("mean_std", every=5), sinks=Sinks(2), recent=Recent(4)),
    "probes": Scheme(both=FOUR, tiers=TWO, router=Saliency("mean", probes=Probes(recent=9), every=6), sinks=Sinks(1)),
    "last": Scheme(both=FOUR, tiers=TWO, router=Saliency("last", every=3)),
    "keys before RoPE": BEFORE_ROPE["down"],
}


@pytest.mark.parametrize("law", ["tiers_hold_what_is_defined", "segments_merge_to_one_softmax"])
@pytest.mark.parametrize("name", BEFORE_ROPE)
def test_keys_before_rope_in_tiers_obey_the_law(name: str, law: str) -> None:
    """P28, P32: words are those of the definitions at the tokens' own positions, whichever tier they come to."""
    tokens = 100 if name == "kvquant in one tier of two" else 52
    LAWS[law](Case(BEFORE_ROPE[name], SHAPE, "torch", batch=2, tokens=tokens, seed=3))


@pytest.mark.parametrize("law", ["tiers_hold_what_is_defined", "segments_merge_to_one_softmax"])
@pytest.mark.parametrize("name", WINDOWS)
def test_tiers_in_a_sliding_window_obey_the_law(name: str, law: str) -> None:
    """P22, P32: no query sees, or gives to, tokens beyond its window, in whatever tier they are."""
    for seed in (1, 5):
        LAWS[law](Case(WINDOWS[name], replace(SHAPE, placed=True), "torch", batch=2, tokens=52, seed=seed))


def test_positions_that_are_one_off_break_a_law(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where keys are put back at them, and where a window is cut by them."""
    right, stands = SegmentCache._places, Front.stands

    def wrong(self: SegmentCache, asked: torch.Tensor | None = None) -> Places | None:
        places = right(self, asked)
        return None if places is None else places._replace(origin=places.origin + 1, end=places.end + 1)

    monkeypatch.setattr(SegmentCache, "_places", wrong)
    case = Case(BEFORE_ROPE["new"], SHAPE, "torch", tokens=40, seed=2)
    with pytest.raises(LawBroken, match="keys of sequence"):
        LAWS["tiers_hold_what_is_defined"](case)
    monkeypatch.undo()
    monkeypatch.setattr(Front, "stands", lambda self, asked: stands(self, asked - 1))
    case = Case(WINDOWS["last"], replace(SHAPE, placed=True), "torch", tokens=40, seed=2)
    with pytest.raises(LawBroken):
        LAWS["segments_merge_to_one_softmax"](case)


def test_queries_that_see_a_token_in_a_window() -> None:
    """By hand: of ten queries, a window of 4: token 2 is seen by those at 2 to 5, token 8 by two; of the newest three
    (7 to 9) none sees token 2, and two see token 5."""
    t = torch.tensor([[2, 8, 5]])
    for queries, window, right in ((10, 4, [4, 2, 4]), (3, 4, [1, 2, 2]), (10, None, [8, 2, 5]), (3, None, [3, 2, 3])):
        assert seeing(t[None], [10], [queries], window)[0, 0].tolist() == right
        empty = torch.zeros(1, 1, 10)
        found = Received(empty, empty, queries, 1, window)
        assert [found.seeing(int(one), queries) for one in t[0]] == right


def test_a_window_over_everything_is_none() -> None:
    """Bit for bit but for kernels that sum in another order."""
    case = Case(WINDOWS["down"], SHAPE, "torch", tokens=40, seed=1)
    run = Run.of(case)
    wide = Run.of(replace(case, shape=replace(SHAPE, placed=True)))
    kernels, params = wide.cache.kernels, wide.cache.params
    wide.cache = TieredCache(kernels, 1, params=params, window=1000)
    for size in (17, 1, 1, 5, 16):
        out, lse = run.step([size])
        other = wide.step([size])
        assert torch.allclose(out, other[0], atol=1e-3) and torch.allclose(lse, other[1], atol=1e-5)
    assert torch.equal(run.cache.labels, wide.cache.labels)


def test_a_cache_in_a_window_is_copied_with_its_positions() -> None:
    run = Run.of(Case(BEFORE_ROPE["down"], replace(SHAPE, placed=True), "torch", batch=2, tokens=60, seed=1))
    run.step([30, 21])
    others = copy.deepcopy(run.cache), pickle.loads(pickle.dumps(run.cache))
    assert [one.window for one in others] == [run.cache.window] * 2
    first, at = run.cache, list(run.at)
    found = []
    for cache in (first, *others):
        run.cache, run.at = cache, list(at)
        found.append([run.step([1, 1])[0] for _ in range(12)][-1])
        found[-1] = torch.cat([found[-1].flatten(), cache.dense("keys").flatten()])
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_the_api_takes_frequencies_once_for_all_tiers() -> None:
    """And a window; where the left padding of sequences begins is known to no tier."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, heads, 60, 32, generator=generator) for heads in (4, 2, 2))
    scheme, rope = BEFORE_ROPE["new"], {"keys.transform[0]": usual(32)}
    assert set(kvdsl.calibrate(scheme, k, v, params=rope)) == {f"tiers[{i}].keys.transform[0]" for i in range(2)}
    told = RoutedStream(scheme, {f"tiers[{i}].keys.transform[0]": usual(32) for i in range(2)}, sliding=25)
    told.append(k[:, :, :50], v[:, :, :50])
    told.route(q[:, :, :50])
    told.append(k[:, :, 50:], v[:, :, 50:])
    want, _ = told.attend(q[:, :, 50:])
    out, _ = kvdsl.attend(
        scheme, q[:, :, 50:], k, v, params=rope, backend="torch", sliding=25, labels=_labels(scheme, q, k, v, rope)
    )
    assert torch.allclose(out.double(), want, atol=1e-3)
    with pytest.raises(ShapeError, match="start: padding is never sent to tiers"):
        kvdsl.attend(scheme, q[:, :, 50:], k, v, params=rope, start=3)


def _labels(
    scheme: Scheme, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rope: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Where the first 50 tokens go; what comes later is exact, and so in no tier."""
    told = RoutedStream(
        scheme, {f"tiers[{i}].keys.transform[0]": x for i, x in enumerate([*rope.values()] * 2)}, sliding=25
    )
    told.append(k[:, :, :50], v[:, :, :50])
    told.route(q[:, :, :50])
    return torch.nn.functional.pad(told.labels(), (0, 10), value=-1)


def test_bits_accounted_are_bytes_held() -> None:
    """P31: keys before RoPE have positions, and bytes for them, without a router, too."""
    scheme = Scheme(keys=ROPED, values=FOUR, tiers=(Tier(),))
    cache = TieredCache(kvdsl.build_tiers(scheme, Shape(32, 2, 4), "torch"), 1, params={"keys.transform[0]": usual(32)})
    x = torch.randn(1, 2, 256, 32).half()
    cache.append(x, x)
    cache.route()
    (tier,) = cache.tiers
    assert tier is not None and tier.placed and tier.counts == (256,)
    pages = len(set(tier.cache.held())) * tier.cache.kernels.page_bytes
    counted = kvdsl.bits(scheme, 32, 2, tokens=256)
    assert 8 * (pages + 4 * 2 * 256) == pytest.approx(counted.mean * 2 * 256 * 2 * 32, abs=1e-6)


def test_tokens_keep_their_positions_on_their_way_down() -> None:
    """P28: a token that is decoded, moved and coded again stands where it stood."""
    scheme = Scheme(keys=ROPED, values=FOUR, tiers=TWO, router=Saliency("last", moves="down"))
    run = Run.of(Case(scheme, SHAPE, "torch", tokens=60, seed=7))
    run.step([40])
    before = run.cache.labels[0].clone()
    run.step([20])
    moved = (before == 0) & (run.cache.labels[0, :, :40] == 1)
    assert int(moved.sum()) > 0
    held = sorted(torch.cat([one.beside.positions[0, 0, : one.counts[0]] for one in run.cache.tiers if one]).tolist())
    assert held == list(range(60))
