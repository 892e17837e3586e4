"""What a cache with tiers holds, token by token in the order in which they came."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .kernels import Side
from .routing import column

if TYPE_CHECKING:
    from .tiered_cache import TieredCache

EXACT, NOTHING = -1, -2


def held(cache: TieredCache, side: Side, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """(all tokens of a side, zeros where one was dropped, (B, H, longest, D) in a dtype or the model's; the tier of
    each, int64 (B, H, longest): EXACT, or NOTHING where there is no token), right aligned."""
    front, most, device = cache.front, max(cache.lengths, default=0), cache.device
    rows = front.rows(side)
    sizes = (*rows.shape[:2], most + 1, rows.shape[3])  # the last place is for what is none
    numbers = torch.zeros(sizes, dtype=dtype or rows.dtype, device=device)
    tier_of = torch.full(numbers.shape[:3], NOTHING, dtype=torch.int64, device=device)
    lead, gone = most - column(cache.lengths, device), column(front.gone, device)

    def put(found: Tensor, at: Tensor, valid: Tensor, tier: int) -> None:
        """Tokens (B, H, K, D) stand at places (B, 1 or H, K), where these are valid."""
        at = torch.where(valid, at, most).expand(found.shape[:3])
        numbers.scatter_(2, at[..., None].expand_as(found), found.to(numbers.dtype))
        tier_of.scatter_(2, at, torch.full_like(at, tier))

    for number, one in enumerate(cache.tiers):
        if one is None:
            place = torch.arange(most + 1, device=device)
            inside = (place >= lead + front.sinks) & (place < lead + front.sinks + gone)
            tier_of.masked_fill_(inside[:, None], number)
    for number, one in enumerate(cache.tiers):
        if one is not None and any(one.counts):
            found = one.numbers(side)
            valid = torch.arange(found.shape[2], device=device) < column(one.counts, device)
            at = one.beside.positions[:, :, : found.shape[2]].long() + (lead + front.sinks)[..., None]
            put(found, at, valid[:, None], number)
    first = min(front.sinks, most)
    place = torch.arange(first, device=device) + lead
    put(rows[:, :, :first], place[:, None], (place < most)[:, None], EXACT)
    waiting = max(front.waiting, default=0)
    place = torch.arange(waiting, device=device) + lead + front.sinks + gone
    index = front.places(waiting)[:, None, :, None].expand(*rows.shape[:2], -1, rows.shape[3])
    put(rows.gather(2, index), place[:, None], (place < most)[:, None], EXACT)
    return numbers[:, :, :most], tier_of[:, :, :most]
