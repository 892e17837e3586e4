"""Laws of caches with tiers: what stands where, what is read of it, and what no decision may depend on."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kvdsl import reference
from kvdsl.params import rope_of
from kvdsl.reference.tiers import TierRows
from kvdsl.scheme import SIDES, Largest, Saliency, Scheme, Tier
from kvdsl.tier_rules import decides_by_position

from .cases import Case, law, require, require_equal, require_within
from .tier_driving import Run, chunks, spread_of, tier_params

TAME = ("normal", "offset", "positive", "ties")
EXACT_KINDS = ("normal", "outlier_channel", "ties", "one_hot", "constant", "tiny")


def without_attention(scheme: Scheme) -> bool:
    """Whether its router knows tokens by their positions or their numbers."""
    return not isinstance(scheme.router, Saliency)


def by_position(scheme: Scheme) -> bool:
    """Whether a token's tier, and what is kept of it, follow from its place in its sequence."""
    if not decides_by_position(scheme.router) or scheme.requantize != "never":
        return False
    tiers = enumerate(scheme.tiers or (Tier(),))
    return not any(TierRows(scheme, tier, number, None).measures for number, tier in tiers if not tier.drops)


def token_by_token(scheme: Scheme) -> bool:
    """Whether what is kept of a token depends on that token alone, in every tier."""
    if scheme.requantize != "never" or (scheme.router is not None and scheme.router.moves != "new"):
        return False
    tiers = [TierRows(scheme, tier, i, None) for i, tier in enumerate(scheme.tiers or (Tier(),)) if not tier.drops]
    scales = [term.measure for tier in tiers for store in tier.stores.values() for term in store.terms]
    shared = any(scale is not None and scale.when == "online" and scale.block.heads != 1 for scale in scales)
    return not shared and all(tier.block == 1 and not tier.measures for tier in tiers)


def ragged(case: Case, run: Run, size: int) -> list[int]:
    """How many of a chunk's tokens each sequence takes: all, a few, or none; one of them takes all."""
    counts = [case.random.choice((size, size, case.random.randint(0, size))) for _ in run.at]
    counts[case.random.randrange(len(counts))] = size
    return [min(count, run.k.shape[2] - at) for count, at in zip(counts, run.at, strict=True)]


@law("P22, P28, P29, P30", kinds=TAME, routed=True)
def tiers_hold_what_is_defined(case: Case) -> None:
    """P22, P28, P29, P30: in a ragged batch every decision is one that each sequence may make alone, and exact rows and
    decoded numbers are those of the definitions under it, whatever chunks came; reordered sequences go on as they
    were."""
    run = Run.of(case)
    for size in chunks(case, case.tokens):
        counts = ragged(case, run, size)
        if any(counts):
            run.step(counts)
            run.tell(counts)
        if case.random.random() < 0.1:
            run.reorder([case.random.randrange(len(run.at)) for _ in run.at])


@law("P1, P32", kinds=TAME, routed=True)
def segments_merge_to_one_softmax(case: Case) -> None:
    """P1, P32: a step's attention is the softmax over all that is held, its own tokens exact, in float64, within what
    products in half precision may be off."""
    run = Run.of(case)
    for size in chunks(case, case.tokens):
        counts = [size] * case.batch
        run.tell(counts, run.step(counts))


@law("P28", token_by_token, kinds=EXACT_KINDS, routed=True)
def equal_tiers_are_no_tiers(case: Case) -> None:
    """P28: where all tiers have the stores of one, a token is read as from a scheme without tiers, bit for bit."""
    first = (case.scheme.tiers or (Tier(),))[0]
    tiers = tuple(tier if tier.drops else replace(first, top=tier.top) for tier in case.scheme.tiers)
    case = replace(case, scheme=case.scheme.with_(tiers=tiers))
    run = Run.of(case)
    for size in chunks(case, case.tokens):
        run.step([size] * case.batch)
    params = {name.removeprefix("tiers[0]."): x for name, x in tier_params(case, run.k, run.v).items()}
    for b in range(case.batch):
        labels = run.labels(b)
        kept = torch.zeros_like(labels, dtype=torch.bool)
        for number, tier in enumerate(case.scheme.tiers or (Tier(),)):
            kept |= (labels == number) & (not tier.drops)
        for side, x in zip(SIDES, (run.k, run.v), strict=True):
            want = reference.quantize(first.store(side, case.scheme.side(side)), x[b : b + 1], params, side).decoded
            require_equal(f"{side} of sequence {b}", run.rows(b, side)[kept], want.to(x.dtype)[kept])


@law("P30", kinds=EXACT_KINDS, routed=True)
def budgets_hold_at_every_step(case: Case) -> None:
    """P30: sinks and the newest tokens are exact, bit for bit; all that left the window is in tiers, none of which
    holds more than its quota of it, or has fewer than before."""
    run, scheme = Run.of(case), case.scheme
    recent = scheme.recent.tokens if scheme.recent else 0
    whole = scheme.recent is not None and scheme.recent.flush == "whole"
    tiers, before = scheme.tiers or (Tier(),), torch.zeros(case.batch, max(1, len(scheme.tiers)), dtype=torch.int64)
    every = 1 if scheme.router is None else scheme.router.every
    for number, size in enumerate(chunks(case, case.tokens)):
        run.step([size] * case.batch)
        tokens = run.at[0]
        behind = max(0, tokens - case.sinks)
        labels = run.cache.labels.cpu()
        exact = torch.zeros(tokens, dtype=torch.bool)
        exact[: case.sinks] = True
        exact[tokens - (behind % recent if whole else min(recent, behind)) :] = True
        require(bool((labels[..., exact] == -1).all()), "a sink or a token of the window is in a tier")
        for side, x in zip(SIDES, (run.k, run.v), strict=True):
            rows, seen = torch.cat([run.rows(b, side) for b in range(case.batch)]), (labels == -1)
            require_equal(f"exact {side} of {tokens} tokens", rows[seen], x[:, :, :tokens][seen])
        routed = int((labels[0, 0] >= 0).sum())
        waiting = int((~exact).sum()) - routed
        if every != "prompt":
            require(waiting < (1 if number == 0 else every), f"{waiting} tokens wait outside the window")
        now = torch.stack([(labels == i).sum(2) for i in range(len(tiers))], 2)
        require(bool((now == now[:, :1]).all()), "a head has more tokens in a tier than another")
        require(bool((now[:, 0] >= before).all()), "a tier has fewer tokens than before")
        for i, tier in enumerate(tiers):
            quota = None if decides_by_position(scheme.router) else tier.quota(routed)
            if quota is not None:
                require(bool((now[..., i] <= quota).all()), f"tier {i} has more than {quota} tokens of {routed}")
            counts = tuple(now[:, 0, i].tolist())
            require(run.cache.counts(i) == counts, f"tier {i} counts {run.cache.counts(i)}, wanted {counts}")
        before = now[:, 0]


@law("P29", without_attention, kinds=EXACT_KINDS, routed=True)
def tiers_know_no_neighbours(case: Case) -> None:
    """P29: a sequence in a ragged batch has the labels and the numbers that it has alone, bit for bit."""
    case = replace(case, batch=max(2, case.batch))
    run = Run.of(case)
    alone = [Run.of(case, k=run.k[b : b + 1], v=run.v[b : b + 1]) for b in range(case.batch)]
    for size in chunks(case, case.tokens):
        counts = ragged(case, run, size)
        if not any(counts):
            continue
        run.step(counts)
        for b, count in enumerate(counts):
            if count:
                alone[b].q = run.q[b : b + 1]
                alone[b].step([count])
            if run.at[b]:
                require_equal(f"labels of sequence {b} of {run.at[b]} tokens", run.labels(b), alone[b].labels(0))
                for side in SIDES:
                    what = f"{side} of sequence {b} of {run.at[b]} tokens"
                    require_equal(what, run.rows(b, side), alone[b].rows(0, side))


@law("P28", by_position, kinds=EXACT_KINDS, routed=True)
def chunks_do_not_matter_to_positions(case: Case) -> None:
    """P28: behind the same prompt, one by one or at once: the same tiers and the same numbers."""
    one, other = Run.of(case), Run.of(case)
    prompt = case.random.randint(1, case.tokens)
    prompt = max(prompt, case.tokens - 12)
    for run, sizes in ((one, [1] * (case.tokens - prompt)), (other, [case.tokens - prompt])):
        for size in (prompt, *filter(None, sizes)):
            run.step([size] * case.batch)
    for b in range(case.batch):
        require_equal(f"labels of sequence {b}", one.labels(b), other.labels(b))
        for side in SIDES:
            require_equal(f"{side} of sequence {b}", one.rows(b, side), other.rows(b, side))


@law("P28", kinds=TAME, routed=True)
def decisions_know_no_future(case: Case) -> None:
    """P28: what comes later changes no output that was given before, and no label of a decision that moves new tokens
    alone; and the same tokens and the same seed give the same."""
    sizes = chunks(case, case.tokens)
    cut = case.random.randint(1, len(sizes))
    k, v = case.pair(case.tokens)
    later = case.pair(case.tokens, seed=5)
    same = torch.arange(case.tokens)[:, None] < sum(sizes[:cut])
    one = Run.of(case, k=k, v=v)
    other = Run.of(case, k=torch.where(same, k, later[0]), v=torch.where(same, v, later[1]))
    other.q = torch.where(same, one.q, case.query(case.tokens, seed=5))
    params, cache = tier_params(case, k, v), one.cache
    other.cache = type(cache)(cache.kernels, case.batch, params=params, window=cache.window, device=cache.device)
    for number, size in enumerate(sizes):
        results = one.step([size] * case.batch), other.step([size] * case.batch)
        if number < cut:
            require_equal(f"output of step {number}", results[1][0], results[0][0])
            require_equal(f"log-sum-exp of step {number}", results[1][1], results[0][1])
            require_equal(f"labels of step {number}", other.cache.labels, one.cache.labels)
            decided = one.cache.labels
    if case.scheme.router is None or case.scheme.router.moves == "new":
        for run in (one, other):
            now = run.cache.labels[..., : decided.shape[2]]
            require_equal("labels of what was decided", now[decided >= 0], decided[decided >= 0])


def without_positions(scheme: Scheme) -> bool:
    """Whether what is kept of a token depends on that token alone, wherever it stands."""
    return token_by_token(scheme) and rope_of(scheme) is None


@law("P1", without_positions, kinds=("normal", "positive"), routed=True)
def the_order_of_tokens_is_no_matter(case: Case) -> None:
    """P1: tokens that come in another order, to the same tiers, change no output but by rounding."""
    share = 1 / max(1, len(case.scheme.tiers))
    tiers = tuple(replace(tier, top=share) for tier in case.scheme.tiers[:-1])
    router = Largest("keys", "norm") if case.scheme.tiers[1:] else None
    scheme = case.scheme.with_(tiers=(*tiers, *case.scheme.tiers[-1:]), router=router, sinks=None, recent=None)
    case = replace(case, scheme=scheme, shape=replace(case.shape, placed=False))
    k, v = case.pair(case.tokens)
    order = torch.randperm(case.tokens, generator=torch.Generator().manual_seed(case.seed))
    outputs = list[Tensor]()
    fresh, query = case.pair(1, seed=3), case.query(1, seed=4)
    for index in (torch.arange(case.tokens), order):
        run = Run.of(case, k=k[:, :, index], v=v[:, :, index])
        run.cache = type(run.cache)(run.cache.kernels, case.batch, params=tier_params(case, k, v))
        run.step([case.tokens] * case.batch)
        device = run.cache.device
        found = run.cache.append_and_attend(*(x.to(device) for x in (query, *fresh)), softcap=run.softcap)
        outputs.append(found[0].cpu())
    keys = 1.5 * torch.cat([k, fresh[0]], 2).repeat_interleave(case.shape.group, 1).double()
    limit = 4 * float(spread_of(query, keys).max()) * float(v.abs().max()) + 1e-3 * float(outputs[0].abs().max())
    require_within("output", outputs[1], outputs[0], limit)
