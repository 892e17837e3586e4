"""A cache with tiers over time, from the definitions: exact tokens that wait, decisions, and what tiers hold.

Sinks stay exact for ever, the newest tokens exact while they are in the window.  A step appends, attends to all as it
stands, and then decides: on the prompt at once, later as soon as `every` tokens wait outside the window.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvdsl.probes import probe_rows
from kvdsl.scheme import SIDES, Saliency, Scheme, Side, Tier

from .choices import EXACT, Choice, grown
from .quantize import Params, widened
from .saliency import Received, carried, importance, pooled, protected, received
from .tiers import Rows, TierRows


class RoutedStream:
    """A cache of B sequences of one length that keeps everything and says what a real one must hold.

    sliding   a query sees the newest `sliding` tokens up to its own
    doubt     how far weights may be off, relative, in a cache whose choices are imposed: bounds `choices`
    choices   the decisions so far, each with what tokens were worth
    """

    def __init__(
        self, scheme: Scheme, params: Params | None = None, *, doubt: float = 0.0, sliding: int | None = None
    ) -> None:
        self.scheme, self.doubt, self.router, self.sliding = scheme, doubt, scheme.router, sliding
        self.tiers = [
            None if tier.drops else TierRows(scheme, tier, number, params)
            for number, tier in enumerate(scheme.tiers or (Tier(),))
        ]
        self.sinks = scheme.sinks.tokens if scheme.sinks else 0
        self.prompt: int | None = None
        self.gone, self.group, self.begun = 0, 1, False
        self.x: dict[Side, Tensor] = {}
        self.where = torch.zeros(0)
        self.queries: list[tuple[int, Tensor]] = []
        self.sums: list[Tensor] = []
        self.choices: list[Choice] = []

    # -- reading ------------------------------------------------------------------------------------------------------

    @property
    def tokens(self) -> int:
        """Tokens appended so far."""
        return self.x["keys"].shape[2] if self.x else 0

    def labels(self) -> Tensor:
        """The tier of each token, int64 (B, H, T), EXACT (-1) where it is exact."""
        return self.where.clone()

    def dropped(self) -> Tensor:
        """Which tokens were dropped, bool (B, H, T)."""
        gone = [number for number, tier in enumerate(self.tiers) if tier is None]
        return torch.isin(self.where, torch.tensor(gone, dtype=torch.int64))

    def rows(self, side: Side) -> Tensor:
        """What is read of a side, float64 (B, H, T, D): exact or decoded, zeros where a token was dropped."""
        held = widened(self.x[side], side).masked_fill(self.dropped()[..., None], 0.0)
        for tier in self.tiers:
            if tier is not None and tier.tokens is not None:
                at = tier.tokens[..., None].expand(-1, -1, -1, held.shape[3])
                held.scatter_(2, at, tier.read(side))
        return held

    def scores(self, q: Tensor, positions: list[int], scale: float | None, softcap: float | None) -> Tensor:
        """Scaled scores of queries q (B, Hq, P, D) at these positions, -inf where they do not see: (B, Hq, P, T)."""
        keys = self.rows("keys")
        group = q.shape[1] // keys.shape[1]
        scores = widened(q, "q") @ keys.repeat_interleave(group, 1).transpose(2, 3)
        scores = scores * (q.shape[3] ** -0.5 if scale is None else scale)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        token, position = torch.arange(self.tokens), torch.tensor(positions)[:, None]
        hidden = token > position
        if self.sliding is not None:
            hidden = hidden | (token <= position - self.sliding)
        scores = scores.masked_fill(hidden, -torch.inf)
        return scores.masked_fill(self.dropped().repeat_interleave(group, 1)[:, :, None], -torch.inf)

    def attend(self, q: Tensor, *, scale: float | None = None, softcap: float | None = None) -> tuple[Tensor, Tensor]:
        """Attention of the newest Q tokens' queries (B, Hq, Q, D) to all as it stands: (out float64, lse float64)."""
        scores = self.scores(q, self._newest(q.shape[2]), scale, softcap)
        values = self.rows("values").repeat_interleave(q.shape[1] // self.where.shape[1], 1)
        return scores.softmax(-1) @ values, scores.logsumexp(-1)

    def _newest(self, count: int) -> list[int]:
        return list(range(self.tokens - count, self.tokens))

    # -- growing ------------------------------------------------------------------------------------------------------

    def step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        labels: Tensor | None = None,
        *,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Append, attention of the new tokens' queries (B, Hq, m, D), routing; see `route` for labels."""
        self.append(k, v)
        found = self.attend(q, scale=scale, softcap=softcap)
        self.route(q, labels, scale=scale, softcap=softcap)
        return found

    def append(self, k: Tensor, v: Tensor) -> None:
        """New tokens (B, H, m, D), exact."""
        for side, new in zip(SIDES, (k, v), strict=True):
            self.x[side] = torch.cat([self.x[side], new], 2) if side in self.x else new
        more = torch.full(k.shape[:3], EXACT, dtype=torch.int64)
        self.where = torch.cat([self.where, more], 2) if self.where.numel() else more

    def route(
        self,
        q: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> None:
        """Note the attention of the step's queries, and decide on what is due.  `labels` int64 (B, H, T): where tokens
        stand behind the decision, whatever this one would be."""
        first, behind = self.prompt is None, max(0, self.tokens - self.sinks)
        if self.tokens and not self.begun:
            self.begun = True
            for tier in self.tiers:
                if tier is not None:
                    tier.begin(q, self.where.shape[1])
        if isinstance(self.router, Saliency) and q is not None:
            self._note(self.router, q, scale, softcap)
        if isinstance(self.router, Saliency) and q is None:
            return
        due = self._due(behind - self.gone, first)
        prompt = behind if self.prompt is None else self.prompt
        if due:
            begin = self.sinks + self.gone
            for tier in self.tiers if not self.gone else ():
                if tier is not None:
                    for when, end in (("prompt", begin + due), ("arrived", self.tokens)):
                        tier.measure({side: self.x[side][:, :, begin:end].double() for side in SIDES}, q, when)
            choice = self._choice(begin, begin + due, prompt, first, scale, softcap)
            self.choices.append(choice)
            self._send(choice, choice.labels() if labels is None else labels)
            self.gone += due
            self.queries = []
        self.prompt = prompt if behind else None

    def _note(self, router: Saliency, q: Tensor, scale: float | None, softcap: float | None) -> None:
        """Keep the queries, or add what they attend to to the sums that are carried on."""
        if not carried(router):
            self.queries += [(position, q[:, :, i]) for i, position in enumerate(self._newest(q.shape[2]))]
            return
        found = self._received(self.scores(q, self._newest(q.shape[2]), scale, softcap).softmax(-1))
        self.group = found.group
        new = [found.first, found.second]
        old = [torch.nn.functional.pad(x, (0, self.tokens - x.shape[2])) for x in self.sums]
        self.sums = [x + y for x, y in zip(old, new, strict=True)] if old else new

    def _received(self, weights: Tensor, queries: int = 0) -> Received:
        return received(weights, self.where.shape[1], queries, self.sliding)

    def _due(self, waiting: int, first: bool) -> int:
        """How many of the tokens that wait leave now."""
        recent = self.scheme.recent
        free = waiting if recent is None else max(0, waiting - recent.tokens)
        if recent is not None and recent.flush == "whole":
            free = waiting - waiting % recent.tokens
        every = 1 if first or self.router is None else self.router.every
        return free if every != "prompt" and free >= every else 0

    # -- deciding -----------------------------------------------------------------------------------------------------

    def _choice(
        self, begin: int, end: int, prompt: int, first: bool, scale: float | None, softcap: float | None
    ) -> Choice:
        """What tokens [begin, end) are worth and how many of them go where."""
        router, tiers = self.router, self.scheme.tiers or (Tier(),)
        held = tuple(int((self.where[0, 0] == number).sum()) for number in range(len(tiers)))
        position = torch.arange(begin - self.sinks, end - self.sinks)
        named = torch.zeros_like(position) if router is None else router.labels(position, prompt)
        worth = torch.zeros(self.where.shape, dtype=torch.float64)
        if named is not None:  # a token is worth more, the lower its tier: all that go to one are worth the same
            worth[:, :, begin:end] = -named.double()
            counts = tuple(has + int((named == number).sum()) for number, has in enumerate(held))
            return Choice(begin, end, self.labels(), worth, worth, counts, "new")
        assert router is not None
        counts = grown(tiers, held, end - begin)
        if not isinstance(router, Saliency):
            found = router.importance(*(self.x[side][:, :, begin:end] for side in SIDES))
            worth[:, :, begin:end] = found.double()
            error = 2.0**-20 * worth.abs()
            return Choice(begin, end, self.labels(), worth - error, worth + error, counts, router.moves)
        low, high = self._saliency(router, begin, end, counts[0], first, scale, softcap)
        return Choice(begin, end, self.labels(), low, high, counts, router.moves)

    def _saliency(
        self,
        router: Saliency,
        begin: int,
        end: int,
        top: int,
        first: bool,
        scale: float | None,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor]:
        """The least and the most that each token may be worth."""
        metric = router.metric if first or router.later is None else router.later
        if carried(router):
            found = Received(self.sums[0], self.sums[1], self.tokens, self.group, self.sliding)
        else:
            at_hand = len(self.queries)
            rows = [at_hand - 1] if metric == "last" else probe_rows(router.probes, at_hand, self.tokens)
            asked = torch.stack([self.queries[row][1] for row in rows], 2)
            weights = self.scores(asked, [self.queries[row][0] for row in rows], scale, softcap).softmax(-1)
            found = self._received(weights, at_hand)
        worth = importance(found, metric)
        low, high = worth, worth
        if metric == "mean_std":
            kept = torch.tensor([number for number, tier in enumerate(self.tiers) if tier is not None])
            ranked = torch.isin(self.where, kept) & (router.moves != "new")
            ranked[:, :, begin:end] = True
            window = self.scheme.recent.tokens if self.scheme.recent else 0
            low, high = protected(worth, found, ranked, top + window, router.scope, self.doubt)
        low, high = low * (1 - self.doubt), high * (1 + self.doubt)
        if router.pool > 1:
            low, high = (pooled(x, begin, end, router.pool) for x in (low, high))
        if router.per == "layer":
            low, high = (x.sum(1, keepdim=True).expand_as(x).clone() for x in (low, high))
        return low, high

    # -- moving -------------------------------------------------------------------------------------------------------

    def _send(self, choice: Choice, labels: Tensor) -> None:
        """Every tier gets the tokens that stand there now: their rows exact, or what the cache read of them before."""
        read = {side: self.rows(side) for side in SIDES}
        anew, came = self.scheme.requantize == "on_flush", dict[int, tuple[Tensor, Rows]]()
        for number, tier in enumerate(self.tiers):
            if tier is None:
                continue
            tokens = _places(tier, labels == number, anew)
            stays = (choice.before == number) & (not anew)
            came[number] = tokens, {side: self._rows(tier, side, tokens, stays, read[side], anew) for side in SIDES}
        for number, (tokens, rows) in came.items():
            tier = self.tiers[number]
            assert tier is not None
            tier.put(tokens, rows)
        self.where = labels.clone()

    def _rows(self, tier: TierRows, side: Side, tokens: Tensor, stays: Tensor, read: Tensor, anew: bool) -> Tensor:
        """What is coded of tokens (B, H, n): of those that stay what it was before; of others what was read of them, in
        the model's dtype but where all is quantized anew in a tier that measures it."""
        dtype = torch.float32 if anew and tier.measures else self.x[side].dtype
        given = read.to(dtype).double()
        if tier.tokens is not None:
            kept = given.scatter(2, _wide(tier.tokens, given), tier.rows[side])
            given = torch.where(stays[..., None], kept, given)
        return given.gather(2, _wide(tokens, given))


def _wide(tokens: Tensor, rows: Tensor) -> Tensor:
    return tokens[..., None].expand(*tokens.shape, rows.shape[3])


def _places(tier: TierRows, here: Tensor, anew: bool) -> Tensor:
    """The tokens that stand in a tier, as many of each head, in their places, int64 (B, H, n): those that stay as they
    stood, then those that come by position; all by position where they are quantized anew."""
    heads = list[Tensor]()
    for b in range(here.shape[0]):
        for h in range(here.shape[1]):
            old = [] if anew or tier.tokens is None else tier.tokens[b, h].tolist()
            stay = [t for t in old if here[b, h, t]]
            come = [t for t in range(here.shape[2]) if here[b, h, t] and t not in set(old)]
            heads.append(torch.tensor(stay + come, dtype=torch.int64))
    return torch.stack(heads).view(*here.shape[:2], -1)
