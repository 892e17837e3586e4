"""Which tokens a decision sends where: counts on the host, places on the device, so that nothing waits for it.

All tiers of a cache hold as many tokens of one kv head of a sequence as of another, though not the same ones.  Index
tensors are (B, H, K) and right aligned: of sequence b the last k_b entries count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .pages import upload
from .scheme import Scheme
from .tier_rules import decides_by_position
from .tier_shares import targets


class Due(NamedTuple):
    """One sequence's decision: of tokens u behind its sinks, those in [begin, end) are sent to tiers; `prompt` is how
    many the first append brought."""

    begin: int
    end: int
    prompt: int

    @property
    def tokens(self) -> int:
        """How many tokens are sent."""
        return self.end - self.begin


def due(scheme: Scheme, routed: int, waiting: int, prompt: int, first: bool) -> Due:
    """What is due of a sequence whose `waiting` tokens stand behind `routed` ones; `first`: at its first decision."""
    recent, router = scheme.recent, scheme.router
    free = waiting if recent is None else waiting - recent.tokens
    if recent is not None and recent.flush == "whole":
        free = waiting // recent.tokens * recent.tokens
    least = 1 if first or router is None else router.every
    ready = least is not None and free >= max(1, least)
    return Due(routed, routed + (free if ready else 0), prompt)


def labels_of(scheme: Scheme, begin: int, end: int, prompt: int) -> Tensor:
    """The tiers of tokens [begin, end) behind the sinks by their positions alone, int64 (end - begin,) on the CPU.

    ValueError for a user's router that names a tier that there is not.
    """
    if scheme.router is None:
        return torch.zeros(end - begin, dtype=torch.int64)
    found = scheme.router.labels(torch.arange(begin, end), prompt)
    if not isinstance(found, Tensor) or tuple(found.shape) != (end - begin,) or found.is_floating_point():
        what = f"{tuple(found.shape)} of {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"router: labels gave {what}; the right answer is int64 ({end - begin},)")
    if len(found) and not 0 <= int(found.min()) <= int(found.max()) < len(scheme.tiers):
        raise ValueError(
            f"router: labels {int(found.min())} to {int(found.max())}; there are tiers 0 to {len(scheme.tiers) - 1}"
        )
    return found.to(torch.int64)


def grown(scheme: Scheme, one: Due, held: Sequence[int]) -> tuple[int, ...]:
    """How many more tokens each tier holds behind a decision than the `held` ones before it: none holds fewer, each as
    many as its quota of all routed tokens allows, the first one first, and the last one takes the rest."""
    if decides_by_position(scheme.router):
        labels = labels_of(scheme, one.begin, one.end, one.prompt)
        return tuple(int((labels == tier).sum()) for tier in range(max(1, len(scheme.tiers))))
    found, left = list[int](), one.tokens
    for wanted, has in zip(targets(scheme, one.end), held, strict=True):
        found.append(min(left, max(0, wanted - has)))
        left -= found[-1]
    return (*found[:-1], found[-1] + left)


def by_position(scheme: Scheme, dues: Sequence[Due], device: torch.device) -> list[Tensor]:
    """For each tier the new tokens that go there, counted from the first new one: int64 (B, 1, K)."""
    labels = [labels_of(scheme, one.begin, one.end, one.prompt) for one in dues]
    found = []
    for tier in range(max(1, len(scheme.tiers))):
        picked = [(x == tier).nonzero()[:, 0].tolist() for x in labels]
        most = max(map(len, picked), default=0)
        rows = [[0] * (most - len(row)) + row for row in picked]
        found.append(upload(rows, device, torch.int64).view(len(rows), 1, most))
    return found


def ranked(importance: Tensor, counts: Sequence[int]) -> Tensor:
    """Places of the most important tokens first, of equal ones the earlier: int64 like importance (B, H, M), of which
    the first counts_b are tokens of sequence b.  A NaN is the least."""
    valid = torch.arange(importance.shape[2], device=importance.device) < column(counts, importance.device)[..., None]
    importance = torch.nan_to_num(importance, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    worst = torch.where(valid, importance, -torch.inf)
    order = worst.sort(dim=2, descending=True, stable=True).indices
    # A token may be worth -inf itself: those that are none go behind all of them.
    return order.gather(2, (~valid.expand_as(order).gather(2, order)).to(torch.int8).sort(dim=2, stable=True).indices)


def stretch(order: Tensor, starts: Sequence[int], counts: Sequence[int]) -> Tensor:
    """The entries [start_b, start_b + count_b) of order (B, H, M), in ascending order: int64 (B, H, K)."""
    most = max(counts, default=0)
    place = torch.arange(most, device=order.device) - (most - column(counts, order.device))[..., None]
    at = (place + column(starts, order.device)[..., None]).clamp(0, max(0, order.shape[2] - 1))
    picked = order.gather(2, at.expand(*order.shape[:2], most))
    return torch.where(place >= 0, picked, -1).sort(dim=2).values.clamp(min=0)


def column(values: Sequence[int], device: torch.device) -> Tensor:
    """Host integers as int64 (B, 1) on the device."""
    return upload(list(values), device, torch.int64)[:, None]


def by_importance(importance: Tensor, dues: Sequence[Due], counts: Sequence[Sequence[int]]) -> list[Tensor]:
    """For each tier the new tokens that go there, by the importance (B, H, M) of the new ones: int64 (B, H, K).

    counts[b][i] tokens of sequence b go to tier i, the most important ones to the first."""
    order = ranked(importance, [one.tokens for one in dues])
    found, starts = [], [0] * len(dues)
    for tier in range(len(counts[0])):
        taken = [row[tier] for row in counts]
        found.append(stretch(order, starts, taken))
        starts = [start + k for start, k in zip(starts, taken, strict=True)]
    return found
