"""Driving a cache with tiers beside the definitions: sequences that grow by chunks of their own, in one batch."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kvdsl.codegen import build
from kvdsl.inputs import DTYPES
from kvdsl.kernels import Params
from kvdsl.reference import RoutedStream
from kvdsl.scheme import SIDES, Saliency
from kvdsl.segments import segments
from kvdsl.tier_contents import held
from kvdsl.tier_kernels import TierKernels, compiled
from kvdsl.tier_params import measured_scales
from kvdsl.tiered_cache import TieredCache

from .cases import Case, require, require_equal, require_within
from .driving import device_of
from .halves import HALF

STEPS = 10
PADDING = 9.0  # what stands before the tokens of a shorter chunk
DRAWS = 6


def tier_kernels(case: Case) -> TierKernels:
    """The scheme's tiers, compiled; of a shape with `placed` for caches with sliding windows."""
    return compiled(case.scheme, case.shape, case.backend, build)


def tier_params(case: Case, k: Tensor, v: Tensor) -> dict[str, Tensor]:
    """Calibrated numbers of all tiers, from k and v."""
    found: dict[str, Tensor] = {}
    for number, segment in enumerate(segments(case.scheme)):
        if segment.scheme is not None:
            own = replace(case, scheme=segment.scheme).params(k, v)
            measured = measured_scales(segment)
            found |= {f"tiers[{number}].{name}": x for name, x in own.items() if name not in measured}
    return found


def new_tiers(case: Case, batch: int, params: Params) -> TieredCache:
    """An empty cache for the case."""
    kernels, capacity = tier_kernels(case), 4 * case.tokens + 512
    device = device_of(kernels)  # type: ignore[arg-type]
    return TieredCache(kernels, batch, params=params, window=sliding(case), capacity=capacity, device=device)


def sliding(case: Case) -> int | None:
    """The sliding window of the case's attention, where it has one: of a share of its tokens, that its seed gives."""
    return max(1, case.tokens * (case.seed % 7 + 1) // 9) if case.shape.placed else None


def chunks(case: Case, tokens: int) -> list[int]:
    """The prompt, then chunks of one token, or a few, or more."""
    found = [case.random.choice((1, min(2, tokens), tokens, case.random.randint(1, tokens)))]
    while (left := tokens - sum(found)) > 0:
        size = case.random.choice((1, 1, 1, 2, 5, 17, 33)) if len(found) < STEPS else left
        found.append(min(size, left))
    return found


@dataclass
class Run:
    """Caches of a case's numbers: k, v (B, H, T, D) and q (B, Hq, T, D), of sequence b `at_b` tokens given."""

    case: Case
    k: Tensor
    v: Tensor
    q: Tensor
    cache: TieredCache
    told: list[RoutedStream] = field(default_factory=list)
    at: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, case: Case, *, doubt: bool = True, k: Tensor | None = None, v: Tensor | None = None) -> Run:
        """Nothing given yet."""
        pair = case.pair(case.tokens)
        k, v = pair[0] if k is None else k, pair[1] if v is None else v
        q, params = case.query(k.shape[2]), tier_params(case, *pair)
        unsure = error_of_weights(case, q, k) if doubt and isinstance(case.scheme.router, Saliency) else 0.0
        told = [RoutedStream(case.scheme, params, doubt=unsure, sliding=sliding(case)) for _ in range(k.shape[0])]
        return cls(case, k, v, q, new_tiers(case, k.shape[0], params), told, [0] * k.shape[0])

    @property
    def softcap(self) -> float | None:
        """As the shape has it."""
        return 30.0 if self.case.shape.softcap else None

    def chunk(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """The next counts_b tokens of each sequence of x, right aligned."""
        out = torch.full((*x.shape[:2], max(counts), x.shape[3]), PADDING, dtype=x.dtype)
        for b, count in enumerate(counts):
            out[b, :, max(counts) - count :] = x[b, :, self.at[b] : self.at[b] + count]
        return out

    def step(self, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Give sequence b its next counts_b tokens: what the cache says, on the CPU."""
        device = self.cache.device
        q, k, v = (self.chunk(x, counts).to(device) for x in (self.q, self.k, self.v))
        found = self.cache.append_and_attend(q, k, v, counts=counts, softcap=self.softcap)
        self.at = [at + count for at, count in zip(self.at, counts, strict=True)]
        return found[0].cpu(), found[1].cpu()

    def labels(self, b: int) -> Tensor:
        """Where the tokens of sequence b stand in the cache, (1, H, T)."""
        return self.cache.labels[b : b + 1, :, self.cache.labels.shape[2] - self.at[b] :].cpu()

    def rows(self, b: int, side: Any) -> Tensor:
        """What the cache holds of sequence b, (1, H, T, D)."""
        found = held(self.cache, side)[0]
        return found[b : b + 1, :, found.shape[2] - self.at[b] :].cpu()

    def tell(self, counts: Sequence[int], got: tuple[Tensor, Tensor] | None = None) -> None:
        """The same step by the definitions, with the choices of the cache, which must be ones that may be made; what
        is held must be equal.  `got`: what attention gave, which must be close."""
        for b, count in enumerate(counts):
            if not count:
                continue
            told, here = self.told[b], slice(self.at[b] - count, self.at[b])
            told.append(self.k[b : b + 1, :, here], self.v[b : b + 1, :, here])
            q = self.q[b : b + 1, :, here]
            if got is not None:
                self._close(told, q, [x[b : b + 1, :, x.shape[2] - count :] for x in got])
            labels, before = self.labels(b), len(told.choices)
            told.route(q, labels, softcap=self.softcap)
            if len(told.choices) > before:
                refused = told.choices[-1].refusal(labels)
                require(not refused, f"sequence {b} of {self.at[b]} tokens: {refused}")
            require_equal(f"labels of sequence {b} of {self.at[b]} tokens", labels, told.labels())
        for b, told in enumerate(self.told):
            if self.at[b]:
                for side in SIDES:
                    what = f"{side} of sequence {b} of {self.at[b]} tokens"
                    require_equal(what, self.rows(b, side), told.rows(side).to(self.k.dtype))

    def reorder(self, index: Sequence[int]) -> None:
        """Chosen sequences, in that order, of the cache and of what is told."""
        chosen = list(index)
        self.cache.reorder(chosen)
        self.k, self.v, self.q = (x[chosen] for x in (self.k, self.v, self.q))
        self.told = [copy.deepcopy(self.told[i]) for i in chosen]
        self.at = [self.at[i] for i in chosen]

    def _close(self, told: RoutedStream, q: Tensor, got: Sequence[Tensor]) -> None:
        """At most three times what drawn errors of products and weights change, plus 1e-3 of the largest output."""
        count, tokens = q.shape[2], told.tokens
        scores = told.scores(q, list(range(tokens - count, tokens)), None, self.softcap)
        out, lse = told.attend(q, softcap=self.softcap)
        group = q.shape[1] // self.k.shape[1]
        keys, values = (told.rows(side).repeat_interleave(group, 1) for side in SIDES)
        spread = spread_of(q, keys, unit_of(self.case))
        source, worst = torch.Generator().manual_seed(self.case.seed), torch.zeros_like(out)
        for _ in range(DRAWS):
            drawn = scores + torch.randn(scores.shape, generator=source, dtype=torch.float64) * spread
            shares = drawn.softmax(-1)
            off = shares * (torch.rand(scores.shape, generator=source, dtype=torch.float64) - 0.5) * HALF
            most = values.abs().amax(2, keepdim=True).expand_as(values)
            worst = torch.maximum(worst, (shares @ values - out).abs() + (off @ most).abs())
        where = f"of {tokens} tokens"
        limit = 3 * float(worst.max()) + 1e-3 * float(out.abs().max()) + 1e-7
        require_within(f"output {where}", got[0], out, limit + torch.finfo(got[0].dtype).eps * out.abs())
        require_within(f"log-sum-exp {where}", got[1], lse, 6 * spread[..., 0] + 1e-5 * lse.abs() + 1e-6)


def unit_of(case: Case) -> float:
    """Twice the rounding unit of what products take: float16, but queries that meet what a tier measures of its tokens
    are rounded to the model's dtype."""
    measured = any(segment.of("keys") is not None for segment in segments(case.scheme))
    return max(HALF, torch.finfo(DTYPES[case.shape.dtype]).eps if measured else 0.0)


def spread_of(q: Tensor, keys: Tensor, unit: float = HALF) -> Tensor:
    """The standard deviation of scaled scores whose products have operands rounded by half a unit, codes up to the
    largest of their channel; float64 (B, Hq, Q, 1)."""
    most, square = keys.double().abs().amax(2, keepdim=True).square(), q.double().square()
    mixed = square.sum(-1, keepdim=True) * most.mean(-1, keepdim=True)  # where a map mixes channels
    size = torch.maximum((square * most).sum(-1, keepdim=True), mixed)
    return q.shape[3] ** -0.5 * (unit / 2) * (2 / 3 * size).sqrt()


def error_of_weights(case: Case, q: Tensor, k: Tensor) -> float:
    """How far a weight of the softmax may be off, relative: six deviations of its score and of its row's log-sum-exp,
    for keys half as large again as they came."""
    spread = float(spread_of(q, 1.5 * k.repeat_interleave(case.shape.group, 1).double(), unit_of(case)).max())
    return min(0.5, 12 * spread + 1e-5)
