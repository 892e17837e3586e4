"""Errors of keys that are fed forward by what a prompt's queries weigh: what SQuat is made of, and where it fails."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import kvdsl
from kvdsl.api import _all_packed
from kvdsl.codegen import build, build_tiers
from kvdsl.errors import SchemeError, ShapeError
from kvdsl.feedback import weighed
from kvdsl.reference import RoutedStream, quantize
from kvdsl.reference.feedback import directions, fed_forward
from kvdsl.scheme import (
    ALL,
    DROP,
    Feedback,
    Largest,
    Recent,
    Rotate,
    Scheme,
    Store,
    Tier,
    Uniform,
    per_channel,
    per_token,
)
from kvdsl.schemes import kivi2, squat2
from kvdsl.shape import Shape
from kvdsl.testing import LAWS, Case
from kvdsl.testing.tier_strategies import ALONE, FED
from kvdsl.tiered_cache import TieredCache

SHAPE = Shape(32, 2, 4, dtype="fp32")
SMALL = Scheme(FED[0], ALONE[0], recent=Recent(16, "whole"), tiers=(Tier(),))
"""Blocks of 16 channels, groups of 8 tokens."""


def normal(*sizes: int, seed: int) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed))


def numbers(tokens: int, batch: int = 1, dim: int = 32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of four heads that lie along few directions but for a tenth of their size, keys and values of two."""
    few = normal(1, 4, 4, dim, seed=seed) * torch.tensor([8.0, 4.0, 2.0, 1.0])[:, None]
    q = normal(batch, 4, tokens, 4, seed=seed + 1) @ few + 0.1 * normal(batch, 4, tokens, dim, seed=seed + 2)
    return q, normal(batch, 2, tokens, dim, seed=seed + 3), normal(batch, 2, tokens, dim, seed=seed + 4)


def given(numbers: Sequence[Tensor], steps: Sequence[int], cache: TieredCache | None = None) -> TieredCache:
    """A cache of SMALL that is given so many tokens a step, behind those that it has."""
    if cache is None:
        cache = TieredCache(build_tiers(SMALL, SHAPE, "torch"), len(numbers[0]), device="cpu")
    first = max(cache.lengths)
    for begin, end in pairwise([first + sum(steps[:i]) for i in range(len(steps) + 1)]):
        cache.append_and_attend(*(x[:, :, begin:end] for x in numbers))
    return cache


def test_without_weight_pages_are_kivis() -> None:
    """Byte by byte: the format is KIVI's, and only what is coded differs."""
    q, k, v = numbers(256, dim=128)
    plain = squat2.with_(**{"keys.feedback.weight": 0.0})
    kernels = build_tiers(plain, Shape(128, 2, 4, dtype="fp32"), "torch")
    cache = TieredCache(kernels, 1, device="cpu")
    cache.append_and_attend(q, k, v)
    table, pool = cache.tiers[0].cache.pages()  # type: ignore[union-attr]
    right = _all_packed(build(kivi2, kernels.shape, "torch"), k, v, {}, ("keys", "values"))
    assert torch.equal(pool[table[0, :2].long()], right.pool)


def test_scores_err_less_where_queries_are_alike() -> None:
    """Over the prompt's own queries, which have four directions that weigh: what the last block errs is left of scores,
    in the square half of KIVI's with blocks of 64 of 128 channels, and less of smaller ones; keys err hardly more."""
    q, k, v = numbers(256, dim=128)
    least = squat2.with_(**{"keys.feedback.channels": 16})
    lost = list[tuple[float, float]]()
    for scheme in (kivi2, squat2, least):
        keys, _ = kvdsl.roundtrip(scheme, k, v, backend="torch", window=False, queries=q)
        scores = q.unflatten(1, (2, 2)) @ (keys - k)[:, :, None].mT
        lost.append((scores.square().mean().item(), (keys - k).square().mean().item()))
    plain, halves, eighths = lost
    assert halves[0] < 0.55 * plain[0] and halves[1] < 1.1 * plain[1]
    assert eighths[0] < 0.2 * plain[0] and eighths[1] < 1.2 * plain[1]


def test_later_channels_move_as_the_paper_says() -> None:
    """Of the errors e of all channels F so far the last block's moves the others by P_LF A_F e: P the inverse of A =
    1 + weight Q^T Q, A_F what A is to F where the others are free.  Errors of blocks before it have moved them already,
    and were none to F then."""
    part = Feedback(3, weight=0.05, channels=16)
    store = Store(Uniform(2), scale=per_channel(tokens=32), feedback=part)
    q, k, _ = (x.double() for x in numbers(64, dim=64))
    few = directions(part, q, 2)
    got = fed_forward(store, k, few, None)
    a = torch.eye(64, dtype=torch.float64) + part.weight * few.mT @ few
    inverse, moved = torch.linalg.inv(a), k.clone()
    for end in (16, 32, 48):
        error = (quantize(store.with_(feedback=None), moved).decoded - moved)[..., end - 16 : end]
        free = torch.linalg.inv(inverse[..., :end, :end])
        moved[..., end:] += error @ (inverse[..., end:, :end] @ free[..., end - 16 :]).mT
    assert (moved - k).abs().max() > 0.1
    torch.testing.assert_close(got, moved, rtol=1e-5, atol=1e-5)


def test_directions_are_the_largest_singular_ones() -> None:
    """Of all queries that meet a kv head, whatever signs they have; of fewer queries the other directions are 0."""
    part = Feedback(3)
    for tokens in (1, 40):
        q = numbers(tokens)[0]
        found, right = weighed(part, q, 2).double(), directions(part, q, 2)
        assert torch.linalg.matrix_rank(right, rtol=1e-6).eq(min(3, 2 * tokens)).all()
        torch.testing.assert_close(found.mT @ found, right.mT @ right, rtol=1e-5, atol=1e-5)


def test_keys_of_the_caller_stay_as_they_are() -> None:
    """The released quantizer moves channels in place; here a step attends to its keys as they came, which stay so."""
    q, k, v = numbers(48)
    before = k.clone()
    cache = TieredCache(build_tiers(SMALL, SHAPE, "torch"), 1, device="cpu")
    out, _ = cache.append_and_attend(q, k, v)
    exact, _ = kvdsl.attend(Scheme(both=Store()), q, k, v, backend="torch")
    assert torch.equal(k, before) and not torch.equal(cache.dense("keys"), k)
    torch.testing.assert_close(out, exact, rtol=1e-3, atol=1e-3)


def test_a_short_prompt_weighs_what_is_packed_later() -> None:
    """10 tokens, of which none is packed: their queries are those that count, and no later one is."""
    q, k, v = numbers(50)
    steps = (10, *[1] * 40)
    cache = given((q, k, v), steps)
    told = RoutedStream(SMALL)
    for begin, end in pairwise([sum(steps[:i]) for i in range(len(steps) + 1)]):
        told.step(*(x[:, :, begin:end] for x in (q, k, v)))
    assert torch.equal(cache.dense("keys").double(), told.rows("keys")) and not torch.equal(cache.dense("keys"), k)
    other = torch.cat([q[:, :, :10], normal(1, 4, 40, 32, seed=9)], 2)
    assert torch.equal(given((other, k, v), steps).dense("keys"), cache.dense("keys"))
    other = torch.cat([normal(1, 4, 10, 32, seed=9), q[:, :, 10:]], 2)
    assert not torch.equal(given((other, k, v), steps).dense("keys"), cache.dense("keys"))


def test_what_queries_weigh_goes_with_its_sequence() -> None:
    """Sequences have their own, whatever order they are brought into, and a cache that is pickled keeps them."""
    every = numbers(40, batch=2)
    cache = given(every, (12,))
    cache.reorder([1, 0])
    swapped = [x.flip(0) for x in every]
    both = [given(swapped, (28,), one).dense("keys") for one in (pickle.loads(pickle.dumps(cache)), cache)]
    for b in range(2):
        alone = given([x[b : b + 1] for x in swapped], (12, 28))
        for found in both:
            assert torch.equal(found[b : b + 1], alone.dense("keys"))
    assert not torch.equal(both[0], swapped[1])


def test_queries_must_be_given() -> None:
    """In the first step, in words; later ones need none."""
    q, k, v = numbers(32)
    with pytest.raises(ShapeError, match="queries: missing; errors of keys are fed forward by what the prompt's"):
        kvdsl.roundtrip(SMALL, k, v, backend="torch")
    cache = TieredCache(build_tiers(SMALL, SHAPE, "torch"), 1, device="cpu")
    cache.append(k[:, :, :8], v[:, :, :8])
    with pytest.raises(ShapeError, match="query: missing; errors of keys .* first step"):
        cache.route()
    cache.route(q[:, :, :8])
    cache.append(k[:, :, 8:], v[:, :, 8:])
    cache.route()
    assert cache.counts(0) == (32,)


def test_a_number_that_is_none_spoils_its_group_alone() -> None:
    q, k, v = numbers(32)
    k[0, 0, 3, 5] = torch.nan
    spoilt = given((q, k, v), (32,)).dense("keys").isnan()
    assert spoilt[0, 0, :8, 5].all() and spoilt.sum() == 8


@pytest.mark.parametrize("keys", FED, ids=["channels", "tokens"])
@pytest.mark.parametrize("law", ["tiers_hold_what_is_defined", "tiers_know_no_neighbours"])
def test_fed_stores_obey_the_laws_of_tiers(law: str, keys: Store) -> None:
    scheme = Scheme(keys, ALONE[1], recent=Recent(16, "whole"), tiers=(Tier(),))
    LAWS[law](Case(scheme, Shape(64, 2, 6, placed=keys is FED[1]), "torch", batch=2, tokens=70, seed=3))


def fed(store: Store | None = None, **more: object) -> Callable[[], Scheme]:
    """A scheme whose keys have feedback, with fields of its own."""
    keys = Store(Uniform(2), scale=per_channel(tokens=32), feedback=Feedback()) if store is None else store
    fields = {"values": Store(), "recent": Recent(128, "whole"), "tiers": (Tier(),)} | more
    return lambda: Scheme(keys=keys, **fields)  # type: ignore[arg-type]


GROUPS = Store(Uniform(2), scale=per_token(channels=48), feedback=Feedback())
TURNED = Store(Uniform(2), scale=per_channel(tokens=32), transform=Rotate(), feedback=Feedback())
LEFT = Store(Uniform(2), scale=per_token(), residual=Store(Uniform(1), scale=per_token(), feedback=Feedback()))


@pytest.mark.parametrize(
    ("make", "wrong"),
    [
        (fed(tiers=()), "keys.feedback: queries of a prompt are at hand where its tokens go to a tier"),
        (fed(tiers=(Tier(), DROP), router=Largest(), recent=None), "keys.feedback: 2 tiers"),
        (fed(recent=Recent(128)), r"recent: 32 tokens are coded together.*use Recent\(128, 'whole'\)"),
        (fed(recent=Recent(100, "whole")), r"use Recent\(128, 'whole'\)"),
        (fed(requantize="on_flush"), "leave requantize out"),
        (fed(values=GROUPS), "values.feedback: queries weigh the errors of keys"),
        (fed(GROUPS), "keys.feedback.channels: blocks of 64 channels cut through groups of 48"),
        (fed(GROUPS.with_(scale=per_token())), "cut through one group"),
        (fed(TURNED), "keys.feedback: errors are fed forward between the vector's own channels"),
        (fed(LEFT), "keys.residual.feedback: errors are fed forward in all of a key"),
        (fed(TURNED.with_(transform=(), scale=per_channel(tokens=ALL))), "keys.scale: one scale over all tokens"),
        (fed(Store(feedback=Feedback(weight=-1.0))), "keys.feedback.weight: -1.0 is no weight"),
    ],
)
def test_what_is_refused_of_feedback(make: Callable[[], Scheme], wrong: str) -> None:
    with pytest.raises(SchemeError, match=wrong):
        make()


def test_bits_are_kivis() -> None:
    """And what is weighed, 5 x 128 numbers of 32 bits for a sequence and kv head."""
    counted = kvdsl.bits(squat2), kvdsl.bits(squat2, tokens=4096)
    assert [(one.keys, one.values) for one in counted] == [(3, 3), (3 + 5 * 32 / 4096, 3)]
