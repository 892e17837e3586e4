"""Which tokens a decision sends where: counts on the host, places on the device, so that nothing waits for it.

All tiers of a cache hold as many tokens of one kv head of a sequence as of another, though not the same ones.
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

FAR = 1 << 30
"""A position behind every token."""


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
    ready = least != "prompt" and free >= max(1, least)
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


def top(worth: Tensor, candidates: Tensor, counts: Sequence[int]) -> Tensor:
    """The counts_b candidates of each head that are worth most, of equal ones the earlier: bool like worth (B, H, L).
    A NaN is worth least."""
    worth = torch.nan_to_num(worth, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    order = worth.sort(dim=2, descending=True, stable=True).indices
    among = candidates.gather(2, order)
    chosen = among & (among.cumsum(2) <= column(counts, worth.device)[..., None])
    return torch.zeros_like(candidates).scatter(2, order, chosen)


def listed(chosen: Tensor, position: Tensor, counts: Sequence[int]) -> Tensor:
    """The places of chosen tokens (B, H, L), counts_b of each head, by rising position: int64 (B, H, K), right aligned,
    so that of sequence b the last counts_b entries are places, and those before are 0."""
    most = max(counts, default=0)
    order = torch.where(chosen, position, FAR).sort(dim=2, stable=True).indices
    place = torch.arange(most, device=position.device) - (most - column(counts, position.device))[..., None]
    picked = order.gather(2, place.clamp(min=0).expand(*order.shape[:2], -1))
    return torch.where(place >= 0, picked, 0)


def column(values: Sequence[int], device: torch.device) -> Tensor:
    """Host integers as int64 (B, 1) on the device."""
    return upload(list(values), device, torch.int64)[:, None]
