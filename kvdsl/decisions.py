"""One decision of a router, carried out: which tokens go to which tier, and the moving of them.

The tokens that a decision is about stand side by side in a pool: those of tiers, tier by tier in the order of their
places there, where they may move or are quantized anew, then the new ones.  All of it is index arithmetic on the
device; how many tokens go where is known on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import ShapeError
from .routing import FAR, Due, column, grown, labels_of, listed, top
from .saliency import Read, chosen_rows, deviation, importance, pooled, reach, received
from .scheme import SIDES, Saliency
from .segment_cache import SegmentCache, Tokens
from .tier_rules import decides_by_position

if TYPE_CHECKING:
    from .tiered_cache import TieredCache

NONE, NEW = -1, -2
"""Where no token of the pool stands, and where a new one does."""


class Decision:
    """The tokens due of each sequence, and the pool (B, H, L): `where` each stands, and its `position` behind the
    sinks."""

    def __init__(
        self, cache: TieredCache, dues: Sequence[Due], reads: Sequence[Read], choice: Tensor | None = None
    ) -> None:
        self.cache, self.dues, self.reads, self.choice = cache, dues, reads, choice
        self.scheme, self.router, self.device = cache.kernels.scheme, cache.kernels.scheme.router, cache.device
        self.front, self.tiers = cache.front, cache.tiers
        self.moves = "new" if self.router is None else self.router.moves
        self.anew = self.scheme.requantize == "on_flush"
        self.due = [one.tokens > 0 for one in dues]
        self.held = [tuple(cache.counts(number)[b] for number in range(len(self.tiers))) for b in range(len(dues))]
        self.more = [
            self._counted(b, one) if choice is not None else grown(self.scheme, one, has)
            for b, (one, has) in enumerate(zip(dues, self.held, strict=True))
        ]
        self.kept = [
            (number, tier, max(tier.counts))
            for number, tier in enumerate(self.tiers)
            if tier is not None and any(tier.counts) and (self.anew or self.moves != "new")
        ]
        self.new = max(one.tokens for one in dues)
        self.places = self.front.places(self.new)[:, None].expand(-1, self.front.keys.shape[1], -1)
        self.where, self.position = self._pool()

    def send(self) -> None:
        """Carry it out."""
        labels = self._labels()
        for tier in self.tiers:
            if tier is not None:
                tier.within(max(self.front.lengths))
        self._measure_prompts()
        for number, tier in reversed(tuple(enumerate(self.tiers))):
            if tier is None:
                continue
            if self.anew:
                self._quantize_anew(number, tier, labels)
            elif self.moves == "down" and number < len(self.tiers) - 1 and any(tier.counts):
                self._take_places(number, tier, labels)
            else:
                self._join(number, tier, labels)

    def _counted(self, b: int, one: Due) -> tuple[int, ...]:
        """How many tokens of a sequence were chosen for each tier, the same in every head."""
        assert self.choice is not None
        begin = self.front.sinks + one.begin
        rows = self.choice[b, :, begin : begin + one.tokens].tolist()
        counts = {tuple(row.count(number) for number in range(len(self.tiers))) for row in rows}
        if len(counts) > 1 or sum(next(iter(counts))) != one.tokens:
            raise ShapeError(
                f"labels: of sequence {b} heads have {' and '.join(map(str, sorted(counts)))} tokens in the tiers, of "
                f"{one.tokens} that are sent; give every head as many in each, and a tier to each token"
            )
        return counts.pop()

    def _pool(self) -> tuple[Tensor, Tensor]:
        heads, wheres, positions = self.front.keys.shape[1], list[Tensor](), list[Tensor]()
        for number, tier, width in self.kept:
            valid = torch.arange(width, device=self.device) < column(tier.counts, self.device)
            wheres.append(torch.where(valid, number, NONE)[:, None].expand(-1, heads, -1))
            positions.append(tier.beside.positions[:, :, :width].long())
        place = torch.arange(self.new, device=self.device)
        valid = place < column([one.tokens for one in self.dues], self.device)
        wheres.append(torch.where(valid, NEW, NONE)[:, None].expand(-1, heads, -1))
        begin = column([one.begin for one in self.dues], self.device)
        positions.append((place + begin)[:, None].expand(-1, heads, -1))
        where, position = torch.cat(wheres, 2), torch.cat(positions, 2)
        waits = (column(self.due, self.device) > 0)[..., None]
        return torch.where(waits, where, NONE), position

    # -- which tokens -------------------------------------------------------------------------------------------------

    def _labels(self) -> Tensor:
        """The tier that each token of the pool goes to, int64 (B, H, L); NONE of none."""
        held = torch.where(self.where == NEW, NONE, self.where)
        if self.choice is not None:
            begin = column([self.front.sinks + one.begin for one in self.dues], self.device)
            at = (begin + torch.arange(self.new, device=self.device)).clamp(max=self.choice.shape[2] - 1)
            new = self.choice.gather(2, at[:, None].expand(-1, self.choice.shape[1], -1))
            new = new.masked_fill(self.where[:, :, -self.new :] != NEW, NONE)
            return torch.cat([held[:, :, : held.shape[2] - self.new], new], 2)
        if decides_by_position(self.router):
            rows = [labels_of(self.scheme, one.begin, one.end, one.prompt) for one in self.dues]
            new = torch.stack([torch.nn.functional.pad(x, (0, self.new - len(x)), value=NONE) for x in rows])
            out = held.clone()
            out[:, :, out.shape[2] - self.new :] = new.to(self.device, non_blocking=True)[:, None]
            return out
        worth, out = self._worth(), torch.full_like(self.where, NONE)
        left = self.where != NONE if self.moves == "any" else self.where == NEW
        for number in range(len(self.tiers)):
            stays = self.where == number
            candidates = left | stays if self.moves == "down" else left
            takes = [more[number] + (0 if self.moves == "new" else held[number])
                     for more, held in zip(self.more, self.held, strict=True)]  # fmt: skip
            chosen = top(worth, candidates, takes)
            out = torch.where(chosen | (stays & (self.moves == "new")), number, out)
            left = candidates & ~chosen
        return out

    def _worth(self) -> Tensor:
        """How much each token of the pool matters: float32 (B, H, L)."""
        heads, router = self.front.keys.shape[1], self.router
        if not isinstance(router, Saliency):
            assert router is not None
            new = router.importance(*(picked(self.front.rows(side), self.places) for side in SIDES)).float()
            return torch.nn.functional.pad(new, (self.where.shape[2] - self.new, 0))
        first, lengths = [prompt is None for prompt in self.cache.prompts], self.cache.lengths
        one, two, queries = self._sums(router, first)
        t = self.position + self.front.sinks
        worth = torch.zeros_like(one)
        metrics = [self.cache.watch.metric(now) for now in first]
        for metric in sorted({metric for metric, due in zip(metrics, self.due, strict=True) if due}):
            found = importance(metric, one, t, lengths, queries, self.cache.window)
            if metric == "mean_std":
                group = (self.cache.kernels.shape.q_heads or heads) // heads
                found = self._protected(found, deviation(one, two, t, lengths, group, self.cache.window), router.scope)
            mine = column([one == metric for one in metrics], self.device) > 0
            worth = torch.where(mine[..., None], found, worth)
        if router.pool > 1:
            real = self.where[:, :, -self.new :] == NEW
            new = torch.where(real, worth[:, :, -self.new :], -torch.inf)
            worth = torch.cat([worth[:, :, : -self.new], pooled(new, router.pool)], 2)
        return worth.sum(1, keepdim=True).expand(-1, heads, -1) if router.per == "layer" else worth

    def _sums(self, router: Saliency, first: Sequence[bool]) -> tuple[Tensor, Tensor, Sequence[int]]:
        """Sums of the weights that the pool's tokens receive, and of their squares, and how many queries there were."""
        if router.carried:
            return self._sums_of_pool[0], self._sums_of_pool[-1], self.cache.lengths
        watch, front = self.cache.watch, self.front
        rows = chosen_rows(watch, first, front.lengths, front.gone)
        exact, *tiers = self.reads
        lse = reach(rows, self.reads)
        sinks = column([min(front.sinks, n) for n in front.lengths], self.device)
        index = (torch.arange(self.new, device=self.device) + sinks).clamp(max=max(0, exact.state.longest - 1))
        by_tier = dict(zip((i for i, tier in enumerate(self.tiers) if tier is not None), tiers, strict=True))
        sums = [received(rows, lse, by_tier[number]) for number, _, _ in self.kept]
        one, two = (x.gather(2, index[:, None].expand(-1, x.shape[1], -1)) for x in received(rows, lse, exact))
        one, two = (torch.cat(parts, 2) for parts in zip(*sums, (one, two), strict=True))
        return one, two, watch.at_hand

    def _protected(self, mean: Tensor, spread: Tensor, scope: float) -> Tensor:
        """Means, but of tokens whose weights vary most infinity: all but a share of those that the first tier and the
        window hold."""
        window = self.scheme.recent.tokens if self.scheme.recent else 0
        kept = [held[0] + more[0] + window for held, more in zip(self.held, self.more, strict=True)]
        ranked = self.where == NEW if self.moves == "new" else self.where != NONE
        steady = top(-spread, ranked, [n - int((1 - scope) * n) for n in kept])
        return torch.where(steady, mean, torch.inf)

    # -- moving them --------------------------------------------------------------------------------------------------

    def _measure_prompts(self) -> None:
        """Of sequences at their first decision, what is measured once is measured on all tokens that are due, or on
        those that wait in the window, too."""
        first = [one.tokens > 0 and one.begin == 0 for one in self.dues]
        for waiting in (False, True):
            tiers = [tier for tier in self.tiers if tier is not None and waiting in tier.once]
            if not tiers or not any(first):
                continue
            if waiting:
                counts, tokens = self._all_rows(first)
            else:
                counts = [one.tokens if now else 0 for one, now in zip(self.dues, first, strict=True)]
                tokens = self._new_rows(listed(self.where == NEW, self.position, counts))
            for tier in tiers:
                tier.measured(tokens, counts, first, self.cache.prompt_query, once=True, waiting=waiting)

    def _all_rows(self, first: Sequence[bool]) -> tuple[list[int], Tokens]:
        """How many tokens behind the sinks the sequences at their first decision have, and these, right aligned."""
        counts = [n if now else 0 for n, now in zip(self.front.waiting, first, strict=True)]
        most, heads = max(counts), self.front.keys.shape[1]
        place = torch.arange(most, device=self.device) - (most - column(counts, self.device))
        index = self.front.places(most).gather(1, place.clamp(min=0))[:, None].expand(-1, heads, -1)
        return counts, {side: picked(self.front.rows(side), index) for side in SIDES}

    def _join(self, number: int, tier: SegmentCache, labels: Tensor) -> None:
        """Tokens that come to a tier are appended: new ones, to the last tier also those of others."""
        counts = [more[number] for more in self.more]
        if not any(counts):
            return
        index = listed((labels == number) & (self.where != number), self.position, counts)
        tier.append(self._rows(index), counts, self.position.gather(2, index), self._sums_of(index))

    def _quantize_anew(self, number: int, tier: SegmentCache, labels: Tensor) -> None:
        """All that a tier holds from now on is quantized, what is packed from what it decodes to."""
        counts = self._totals(number)
        index = listed(labels == number, self.position, counts)
        tokens: Tokens = {side: picked(self._numbers[side], index) for side in SIDES}
        sums = self._sums_of(index)
        tier.rebuild(tokens, counts, self.position.gather(2, index), sums, self.due, self.cache.prompt_query)
        self.cache.requantized += 2 * sum(held[number] for held, due in zip(self.held, self.due, strict=True) if due)

    def _totals(self, number: int) -> list[int]:
        """How many tokens of each due sequence stand in a tier behind the decision."""
        rows = zip(self.more, self.held, self.due, strict=True)
        return [more[number] + held[number] if due else 0 for more, held, due in rows]

    @cached_property
    def _numbers(self) -> Tokens:
        """The numbers of the whole pool (B, H, L, D), float32, as they were before any tier changed."""
        new = {side: picked(self.front.rows(side), self.places).float() for side in SIDES}
        return {side: torch.cat([*(tier.numbers(side) for _, tier, _ in self.kept), new[side]], 2) for side in SIDES}

    @cached_property
    def _sums_of_pool(self) -> Tensor:
        """The sums that are carried on of the whole pool (sums, B, H, L)."""
        new = self.front.sums.gather(3, self.places.expand(len(self.front.sums), *self.places.shape))
        return torch.cat([*(tier.beside.sums[..., :width] for _, tier, width in self.kept), new], 3)

    def _sums_of(self, index: Tensor) -> Tensor:
        """Those of tokens of the pool, by places (B, H, K)."""
        return self._sums_of_pool.gather(3, index.expand(len(self.front.sums), *index.shape))

    def _take_places(self, number: int, tier: SegmentCache, labels: Tensor) -> None:
        """Tokens that come to a tier take the places of those that leave it, and as many more as it grows by."""
        more = [one[number] for one in self.more]
        arrives = (labels == number) & (self.where != number)
        leaves = (self.where == number) & (labels != number)
        index = self._first(arrives)
        free = self._first(leaves) - self._offset(number)
        place = torch.arange(self.new, device=self.device)
        left = leaves.sum(2, keepdim=True)
        slots = torch.where(place < left, free, place - left + column(tier.counts, self.device)[..., None])
        live = place < arrives.sum(2, keepdim=True)
        tokens = self._rows(index)
        tier.reserve(more)
        tier.put(slots.where(live, 0), live, tokens, self.position.gather(2, index), self._sums_of(index))

    def _first(self, chosen: Tensor) -> Tensor:
        """The places in the pool of chosen tokens, by rising position: as many as there are new ones (B, H, M)."""
        return torch.where(chosen, self.position, FAR).sort(dim=2, stable=True).indices[:, :, : self.new]

    def _offset(self, number: int) -> int:
        """Where the tokens of a tier begin in the pool."""
        return sum(width for other, _, width in self.kept if other < number)

    def _new_rows(self, index: Tensor) -> Tokens:
        """Exact rows of new tokens, by their places in the pool (B, H, K)."""
        behind = (index - (self.where.shape[2] - self.new)).clamp(min=0)
        places = self.places.gather(2, behind)
        return {side: picked(self.front.rows(side), places) for side in SIDES}

    def _rows(self, index: Tensor) -> Tokens:
        """Tokens of the pool by their places (B, H, K): exact rows of new ones, others decoded."""
        tokens = self._new_rows(index)
        stands = self.where.gather(2, index)
        for number, tier, width in self.kept:
            slots = (index - self._offset(number)).clamp(0, width - 1)
            here = (stands == number)[..., None]
            for side in SIDES:
                tokens[side] = torch.where(here, tier.fetch(side, slots).to(tokens[side].dtype), tokens[side])
        return tokens


def picked(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x (B, H, N, D) by places (B, H, K): (B, H, K, D)."""
    return x.gather(2, index[..., None].expand(*index.shape, x.shape[3]))
