"""Laws of the attention that tokens receive, against the columns' sums of a float64 softmax over what a cache holds."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvdsl.reference.queries import products
from kvdsl.reference.timeline import packed_tokens

from .attention import Step, coded, rounding_of, score_sizes, step_of
from .cases import Case, law, require, require_within
from .data import MODEST
from .driving import USUAL, Poison, device_of, ready
from .products import product_errors


@dataclass(frozen=True)
class Weights:
    """A softmax of probes in float64: `scores` (B, Hq, P, T), -inf where a token is not seen, and how far each may be
    off, of the same shape."""

    scores: Tensor
    errors: Tensor

    @property
    def lse(self) -> Tensor:
        return torch.logsumexp(self.scores, -1)

    @property
    def shares(self) -> Tensor:
        """p, 0 where nothing is seen."""
        return (self.scores - self.lse[..., None]).exp().nan_to_num(0.0)

    @property
    def lse_errors(self) -> Tensor:
        """How far a log-sum-exp may be off: as far as any score, and by rounding."""
        lse = torch.where(self.lse.isinf(), 0.0, self.lse)
        return self.errors.amax(-1) + rounding_of(lse)

    def share_errors(self, power: int) -> Tensor:
        """How far p^power may be off, p = exp(score - lse): by what either may be, in the exponent."""
        off = (self.errors + self.lse_errors[..., None] + 2.0**-20) * power
        exponent = ((self.scores - self.lse[..., None]) * power).nan_to_num(-math.inf, neginf=-math.inf)
        return (exponent + off).clamp(max=600).exp() - exponent.exp()


def weights_of(case: Case, step: Step, position: Tensor) -> Weights:
    """The softmax of the step's queries as probes at these positions (B, P)."""
    scaling, cap = step.options.get("scaling"), step.options.get("softcap")
    scaling = case.shape.head_dim**-0.5 if scaling is None else scaling
    size = (*step.q.shape[:3], max(step.lengths))
    scores, errors = torch.full(size, -math.inf, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    for b, length in enumerate(step.lengths):
        keys, q = coded(case, step, b, "keys")[0], step.q[b : b + 1]
        held = keys.repeat_interleave(case.shape.group, 1).transpose(2, 3)
        span = packed_tokens(case.scheme, "keys", step.seen[b])
        score = products(case.scheme, q, keys, span, step.params) * scaling
        score = score if cap is None else torch.tanh(score / cap) * cap
        sizes = score_sizes(case, step, b)
        error = product_errors(case.scheme.keys, case.kernels.backend, q, held, *sizes) * scaling
        error = error + 2.0**-22 * score.abs()
        start, token = step.options.get("start"), torch.arange(length)
        seen = (token <= position[b, :, None]) & (token >= (0 if start is None else start[b]))
        scores[b, :, :, :length] = score[0].masked_fill(~seen, -math.inf)
        errors[b, :, :, :length] = error[0].masked_fill(~seen, 0.0)
    return Weights(scores, errors)


def received(
    case: Case, step: Step, position: Tensor, lse: Tensor | None = None, poison: Poison = USUAL
) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernels say, on the CPU: log-sum-exps, which are taken if none are given, and both sums."""
    device = device_of(case.kernels)
    state, params = step.state(case, poison), ready(case.kernels, step.params)
    q, at = step.q.to(device), position.to(device, torch.int32)
    given = case.kernels.reach(q, at, state, params) if lse is None else lse.to(device)
    first, second = case.kernels.received(q, at, given, state, params)
    return given.cpu(), first.cpu(), second.cpu()


def probes_of(case: Case, *, start: bool = True) -> tuple[Step, Tensor]:
    """A ragged step whose queries are probes, and where they stand: anywhere in their sequences, in any order, some
    twice, some nowhere (-1); in one case of four no token is packed."""
    random = case.random
    count = random.choice((1, 2, 5, 19))
    step = replace(step_of(case, 1), q=case.query(count))
    if random.random() < 0.25:
        step = replace(step, seen=(0,) * case.batch)
    if start and random.random() < 0.5:
        step = replace(step, options={**step.options, "start": [random.randint(0, n) for n in step.lengths]})
    rows = [[random.choice((-1, random.randrange(n), n - 1)) for _ in range(count)] for n in step.lengths]
    position = torch.tensor(rows)
    if count > 2:  # a probe twice
        position[:, 1] = position[:, 0]
        step.q[:, :, 1] = step.q[:, :, 0]
    return step, position


def by_kv_head(case: Case, of_rows: Tensor) -> Tensor:
    """Sums over rows and the query heads of a group: (B, Hq, P, T) -> (B, H, T)."""
    return of_rows.unflatten(1, (case.shape.kv_heads, -1)).sum((2, 3))


@law("P22", kinds=MODEST)
def received_attention_is_column_sums(case: Case) -> None:
    """P22: log-sum-exps of probes are those of the scores that they see, within what scores may be off
    (`product_errors`); what a token receives are the column's sums of p and of p^2, each p by what its score and its
    row's log-sum-exp may be off in its exponent, and sums by 1e-5 of their size.  A softcap has slopes up to 1."""
    step, position = probes_of(case)
    lse, first, second = received(case, step, position)
    weights = weights_of(case, step, position)
    want = weights.lse
    require(bool((lse.isinf() == want.isinf()).all()), "a row that sees nothing, and no other, has -inf")
    there = ~want.isinf()
    require_within("log-sum-exp", lse[there], want[there], weights.lse_errors[there])
    for power, name, got in ((1, "sum of p", first), (2, "sum of p^2", second)):
        right = by_kv_head(case, weights.shares**power)
        limit = by_kv_head(case, weights.share_errors(power)) + 1e-5 * right + 1e-30
        require_within(name, got, right, limit)


@law("P22", kinds=MODEST)
def attention_given_is_attention_received(case: Case) -> None:
    """P22: what all tokens of a sequence receive adds up to the number of rows that see any: each gives 1, up to the
    rounding of its log-sum-exp and of scores in float32, 2^-20 of their size, and of sums."""
    step, position = probes_of(case)
    lse, first, second = received(case, step, position)
    scores = weights_of(case, step, position).scores
    size = torch.where(scores.isinf(), 0.0, scores.abs()).amax(-1) + torch.where(lse.isinf(), 0.0, lse.abs())
    sums = (rows[..., None] for rows in ((~lse.isinf()).double(), 2.0**-20 * size))
    count, limit = (by_kv_head(case, rows)[..., 0] for rows in sums)
    require_within("sum of what is received", first.double().sum(-1), count, limit + 1e-5 * count)
    excess = (second - first).double().amax(-1) - (2 * limit + 1e-5 * count)  # as p, at most 1, by rounding
    require(bool((excess <= 0).all()), "a sum of p^2 is larger than that of p")
    for b, length in enumerate(step.lengths):
        beyond = first[b, :, length:], second[b, :, length:]
        require(all(bool((one == 0).all()) for one in beyond), f"tokens behind those of sequence {b} receive something")


@law("P29", kinds=("normal", "outlier_channel"))
def poison_receives_nothing(case: Case) -> None:
    """P29: whatever stands in places that hold no token, log-sum-exps and sums are the same to the bit; a second
    segment's share is that of the union: with log-sum-exps raised by log 2, half of each p."""
    step, position = probes_of(case)
    one = received(case, step, position)
    other = received(case, step, position, poison=Poison(0xFF, -65504.0, seed=0))
    for name, got, want in zip(("log-sum-exp", "sum of p", "sum of p^2"), other, one, strict=True):
        require(bool((got == want).all()), f"{name} with another poison differs")
    _, half, quarter = received(case, step, position, one[0] + math.log(2))
    limit = 2.0**-20 * (1 + one[0].where(~one[0].isinf(), torch.zeros(())).abs().max().double())
    require_within("half of the sum of p", 2 * half, one[1], limit * one[1].double() + 1e-30)
    require_within("a quarter of the sum of p^2", 4 * quarter, one[2], 2 * limit * one[2].double() + 1e-30)
