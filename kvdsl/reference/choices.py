"""One decision about the tiers of tokens: what each is worth, how many go where, and so which ones.

Worth is known within a doubt: a choice among tokens whose bounds overlap may go either way, and `refusal` says of a
choice that was made elsewhere whether it is one of those.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kvdsl.tiers import Moves, Tier

EXACT = -1


@dataclass(frozen=True)
class Choice:
    """The tokens [begin, end) are new; all stand where `before` says, int64 (B, H, T), EXACT where they are exact.

    low, high   what each token is worth, float64 (B, H, T)
    counts      how many tokens of a head stand in each tier behind the decision
    """

    begin: int
    end: int
    before: Tensor
    low: Tensor
    high: Tensor
    counts: tuple[int, ...]
    moves: Moves

    def labels(self) -> Tensor:
        """Where tokens stand behind the decision: the most valuable first, of equal ones the earlier."""
        out = self.before.clone()
        for b, h, worth in self._heads(self.low):
            for tier, candidates, take in self._rounds(out[b, h], self.before[b, h]):
                ranked = sorted(candidates, key=lambda t: (-worth[t], t))
                out[b, h, candidates] = EXACT
                for t in ranked[:take]:
                    out[b, h, t] = tier
        return out

    def refusal(self, labels: Tensor) -> str:
        """Why tokens may not stand as `labels` says behind the decision; "" where they may."""
        ranked = (self.before >= 0) if self.moves != "new" else torch.zeros_like(self.before, dtype=torch.bool)
        ranked[:, :, self.begin : self.end] = True
        if not torch.equal(labels[~ranked], self.before[~ranked]):
            return "a token that the decision is not about was moved"
        for b, h, low in self._heads(self.low):
            high = self.high[b, h].tolist()
            out = labels[b, h].clone()
            for tier, candidates, take in self._rounds(out, self.before[b, h]):
                chosen = [t for t in candidates if int(labels[b, h, t]) == tier]
                if len(chosen) != take:
                    return f"tier {tier} of head {h} takes {len(chosen)} of {len(candidates)} tokens, and not {take}"
                passed = set(candidates) - set(chosen)
                if chosen and passed:
                    worst, best = min(chosen, key=lambda t: high[t]), max(passed, key=lambda t: low[t])
                    if high[worst] < low[best]:
                        why = f"worth {high[worst]:.6g} at most and {low[best]:.6g} at least"
                        return f"tier {tier} of head {h} takes token {worst} before token {best}, {why}"
        return ""

    def _rounds(self, out: Tensor, before: Tensor) -> Iterator[tuple[int, list[int], int]]:
        """Tier by tier the tokens that may go there, `out` (T,) as those before it left it, and how many do."""
        left = list(range(self.begin, self.end))
        if self.moves == "any":
            left = [t for t in range(len(before)) if before[t] >= 0 or t in left]
        for tier, count in enumerate(self.counts):
            own = [t for t in range(len(before)) if before[t] == tier]
            candidates = left + own if self.moves == "down" else left
            yield tier, candidates, count - (len(own) if self.moves == "new" else 0)
            left = [t for t in candidates if int(out[t]) != tier]

    def _heads(self, worth: Tensor) -> Iterator[tuple[int, int, list[float]]]:
        for b in range(worth.shape[0]):
            for h in range(worth.shape[1]):
                yield b, h, worth[b, h].nan_to_num(-torch.inf, torch.inf, -torch.inf).tolist()


def grown(tiers: tuple[Tier, ...], held: tuple[int, ...], new: int) -> tuple[int, ...]:
    """How many tokens stand in each tier behind a decision about `new` ones, of which `held` stood there before.

    A tier grows to its quota of all tokens ever routed, but to no more than what the tiers before it leave by their
    quotas; it never shrinks, the first one takes first, and the last one the rest.
    """
    routed = sum(held) + new
    left, unclaimed, found = new, routed, list[int]()
    for tier, has in zip(tiers[:-1], held[:-1], strict=True):
        quota = tier.quota(routed)
        assert quota is not None
        claimed = min(quota, unclaimed)
        arrives = min(left, max(0, claimed - has))
        found.append(has + arrives)
        left, unclaimed = left - arrives, unclaimed - claimed
    return (*found, held[-1] + left)
