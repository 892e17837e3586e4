"""How much attention tokens receive, and how much they matter by it, from rows of the softmax matrix as they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvdsl.tiers import Metric, Saliency


@dataclass(frozen=True)
class Received:
    """The sums of weights, and of their squares, that tokens receive of the rows at hand and the query heads of a kv
    head, float64 (B, H, T); `queries` are at hand, which are `group` rows each, and see the newest `sliding` tokens."""

    first: Tensor
    second: Tensor
    queries: int
    group: int
    sliding: int | None = None

    def seeing(self, t: int, queries: int) -> int:
        """How many of the newest queries see token t, which stand at the last of all tokens; one at least."""
        tokens = self.first.shape[2]
        rows = range(max(0, tokens - queries), tokens)
        return max(1, sum(t <= p and (self.sliding is None or t > p - self.sliding) for p in rows))


def received(weights: Tensor, heads: int, queries: int, sliding: int | None = None) -> Received:
    """The sums of weights (B, Hq, P, T)."""
    rows = weights.unflatten(1, (heads, -1))
    return Received(rows.sum((2, 3)), rows.square().sum((2, 3)), queries, rows.shape[2], sliding)


def importance(found: Received, metric: Metric) -> Tensor:
    """How much each token matters, (B, H, T), but for what `mean_std` says of those whose weights vary."""
    tokens = found.first.shape[2]
    out = found.first.clone()
    for t in range(tokens):
        if metric == "normalized":
            out[:, :, t] /= found.seeing(t, found.queries)
        elif metric in ("mean", "mean_std"):
            out[:, :, t] /= found.seeing(t, tokens)
    return out


def protected(
    mean: Tensor, found: Received, ranked: Tensor, kept: int, scope: float, doubt: float
) -> tuple[Tensor, Tensor]:
    """The least and the most that tokens may be worth by `mean_std`: infinity where their weights vary, but for as many
    `ranked` ones (T,) as are a `scope` share of `kept`, which vary least and are worth their mean."""
    tokens, steady = mean.shape[2], kept - int((1 - scope) * kept)
    seen = torch.tensor([found.seeing(t, tokens) for t in range(tokens)], dtype=torch.float64) * found.group
    square, middle = found.second / seen, (found.first / seen).square()
    error = 4 * doubt * (square + middle)
    spread = (square - middle).clamp(min=0)
    least, most = (spread - error).clamp(min=0), spread + error
    low, high = mean.clone(), mean.clone()
    for b in range(mean.shape[0]):
        for h in range(mean.shape[1]):
            those = [t for t in range(tokens) if ranked[b, h, t]]
            for place, t in enumerate(sorted(those, key=lambda t: (float(spread[b, h, t]), t))):
                if doubt:
                    below = sum(1 for s in those if s != t and most[b, h, s] < least[b, h, t])
                    perhaps = sum(1 for s in those if s != t and least[b, h, s] <= most[b, h, t])
                    varies, may_vary = below >= steady, perhaps >= steady
                else:
                    varies = may_vary = place >= steady
                low[b, h, t] = torch.inf if varies else low[b, h, t]
                high[b, h, t] = torch.inf if may_vary else high[b, h, t]
    return low, high


def pooled(worth: Tensor, begin: int, end: int, neighbours: int) -> Tensor:
    """The new tokens [begin, end) worth as much as the most valuable of so many new neighbours."""
    out, reach = worth.clone(), neighbours // 2
    for t in range(begin, end):
        out[:, :, t] = worth[:, :, max(begin, t - reach) : min(end, t + reach + 1)].amax(2)
    return out


def carried(router: Saliency) -> bool:
    """Whether sums are carried on from step to step."""
    return router.probes is None and router.every != "prompt" and "last" not in (router.metric, router.later)
