"""The torch backend: pages gathered and scattered, windows and masks, around the generated functions.

It runs on any device.  Working memory grows with the packed tokens that a call reads; the pool itself is never copied.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from kvdsl.kernels import AttentionState, Fold, Form, Params, Places, Segments, Side
from kvdsl.merging import merged
from kvdsl.spaces import applied

from .chunks import WORKING, decoded_chunks
from .host_beside import met_at
from .host_channels import queries
from .host_products import scored
from .plan import SidePlan
from .run_queries import Asked, among_decoded, asked
from .run_torch_pages import TorchPages, on_host
from .torch_alone import one_by_one

LOG2E = 1.4426950408889634
LOWEST = torch.finfo(torch.float32).min


class Span(NamedTuple):
    """Which tokens u one call reads: from the first one of page `low` on, those before `end`; those that some sequence
    has packed are before page `high`.

    `alike`: every sequence has the same numbers, so exact rows are slices and no token is another's; else `keys` and
    `values`, from which on tokens are exact, are the lowest of all sequences.  `masked`: some query row does not see
    some token.
    """

    low: int
    high: int
    end: int
    keys: int
    values: int
    first: int
    alike: bool
    masked: bool


class TorchModule(TorchPages):
    """The functions of one generated module, bound to pools and tables."""

    def _rows(self, query: Tensor, factor: float) -> Tensor:
        """Query (B, Hq, Q, D) as columns (B, H, D, Q * group), float32, scaled."""
        batch, _, queries, dim = query.shape
        grouped = query.to(torch.float32).mul(factor).unflatten(1, (self.plan.shape.kv_heads, -1))
        return grouped.movedim(2, 3).reshape(batch, self.plan.shape.kv_heads, queries * self.plan.shape.group, dim).mT

    def _asked(self, query: Tensor, factor: float, params: Params) -> Asked:
        """The same, and what they are for packed keys."""
        if self.plan.queries is None:
            return Asked(self._rows(query, factor))
        return asked(self.plan, self.module, self._rows(query, 1.0), factor, params)

    def _heads(self, x: Tensor, queries: int) -> Tensor:
        """(B, H, Q * group, n) back to (B, Hq, Q, n)."""
        return x.unflatten(2, (queries, self.plan.shape.group)).movedim(3, 2).flatten(1, 2)

    def scores(
        self, query: Tensor, pool: Tensor, table: Tensor, tokens: int, params: Params, places: Places | None = None
    ) -> Tensor:
        batch, heads, queries, _ = query.shape
        if tokens == 0:
            return torch.empty(batch, heads, queries, 0, device=query.device)
        pages = -(-tokens // self.plan.layout.page_tokens)
        rows = self._asked(query, 1.0, params)
        score = self._scores_of_codes(rows, self._gather(pool, table, 0, pages), 0, params, places)
        return self._heads(score.mT[..., :tokens], queries)

    def _scores_of_codes(
        self, asked: Asked, pages: Tensor, first: int, params: Params, places: Places | None = None
    ) -> Tensor:
        """q.k of the tokens of pages (B, pages, page_bytes), packed from u = first on: the query is mapped, not the
        keys, but for rotary positions and what is behind them."""
        if self.plan.keys.rope is not None:
            decoded, *others = (
                getattr(self.module, f"unpack_{part.space}")(*self._inputs(part, pages, params))
                for part in self.plan.keys.spaces
            )
            if self.plan.keys.mapped:
                decoded = applied(params["keys.decode"], decoded)
            if self.plan.keys.shifted:
                decoded = decoded + params["keys.decode_shift"][:, None]
            return scored(self._placed(sum(others, decoded), first, params, torch.float32, places), asked.columns)
        first_score, *others = (self._term_scores(term, asked, pages, params) for term in self.plan.keys.spaces)
        return sum(others, first_score)

    def _term_scores(self, term: SidePlan, asked: Asked, pages: Tensor, params: Params) -> Tensor:
        columns, met = asked
        if term.masked:
            decode, channels = params[f"{term.home}.decode"], self._channels(term, pages)
            met = queries(columns, decode, channels, top=term.store.gathers)
            return getattr(self.module, term.product)(met, *self._inputs(term, pages, params))
        if term.beside:
            met = met_at(columns, self._channels(term, pages))
            return getattr(self.module, term.product)(met, *self._inputs(term, pages, params))
        if met is None:
            met = (columns.mT @ params[f"{term.home}.decode"]).mT if term.mapped else columns
        inputs, together = self._inputs(term, pages, params), term.joined
        if together == 1:
            score: Tensor = getattr(self.module, term.product)(met, *inputs)
        else:
            score = getattr(self.module, term.product)(_by_stored(met, together), *inputs)
            score = _by_reader(score, together).unflatten(2, (together, -1)).sum(2)
        return score + (params[f"{term.home}.decode_shift"][:, None] @ columns) if term.shifted else score

    def _sums_of_codes(self, weights: Tensor, pages: Tensor, params: Params) -> Tensor:
        """Sums of packed values under weights (B, H, tokens, rows), as vectors of the head: (B, H, D, rows)."""
        total, *others = (self._term_sums(term, weights, pages, params) for term in self.plan.values.spaces)
        return sum(others, total)

    def _term_sums(self, term: SidePlan, weights: Tensor, pages: Tensor, params: Params) -> Tensor:
        inputs, together = self._inputs(term, pages, params), term.joined
        if together == 1:
            total: Tensor = getattr(self.module, term.product)(weights, *inputs)
        else:
            every = _by_stored(weights.repeat(1, 1, together, 1), together)
            total = _by_reader(getattr(self.module, term.product)(every, *inputs), together)
        if term.mapped:
            total = (total.mT @ params[f"{term.home}.decode"].mT).mT
        if term.shifted:
            total = total + params[f"{term.home}.decode_shift"][..., None] * weights.sum(-2, keepdim=True)
        return total

    def form(self, queries: int, packed: int, exact: int, window: int | None) -> Form:
        """Products of codes, for all tokens at once, while their scores fit working memory, else chunk by chunk."""
        scores = 4 * queries * self.plan.shape.kv_heads * self.plan.shape.group * (packed + exact)
        return "dense" if scores > WORKING else "decode" if queries == 1 else "extend"

    def attend(
        self, query: Tensor, state: AttentionState, params: Params, splits: int | None = None, form: Form | None = None
    ) -> tuple[Tensor, Tensor]:
        """See KernelSet; given `splits`, sequences are read one by one, by products of codes."""
        if splits is not None and query.shape[0] > 1:
            return one_by_one(
                lambda q, own: self.attend(q, *own[0][1:3], splits, form), query, [(self, state, params, None)]
            )
        out, lse = self._in_form(query, state, params, splits, form)
        return out.to(query.dtype), lse

    def union(
        self, query: Tensor, segments: Segments, splits: int | None = None, form: Form | None = None
    ) -> tuple[Tensor, Tensor]:
        if splits is not None and query.shape[0] > 1:
            return one_by_one(lambda q, own: self.union(q, own, splits, form), query, segments)
        found = [
            module._in_form(query, state, params, splits, form)
            if fold is None
            else module._folded(fold, state, params, splits, form)
            for module, state, params, fold in segments
        ]
        out, lse = (torch.stack(each) for each in zip(*found, strict=True))
        total, whole = merged(out, lse)
        return total.to(query.dtype), whole

    def _in_form(
        self, query: Tensor, state: AttentionState, params: Params, splits: int | None, form: Form | None
    ) -> tuple[Tensor, Tensor]:
        """Output (B, Hq, Q, D) and log-sum-exp (B, Hq, Q), float32, in the form that is asked for or the usual one."""
        if form is None and splits is None:
            form = self.form(query.shape[2], state.packed_most, state.longest - state.packed_most, state.window)
        return self._dense(query, state, params) if form == "dense" else self._attended(query, state, params)

    def _folded(
        self, fold: Fold, state: AttentionState, params: Params, splits: int | None, form: Form | None
    ) -> tuple[Tensor, Tensor]:
        """The same where something was taken out of the segment's numbers."""
        out, lse = self._in_form(fold.query, state, params, splits, form)
        group = self.plan.shape.group
        if fold.factor is not None:
            out = out * fold.factor.repeat_interleave(group, 1)[:, :, None]
        if fold.shift is not None:
            out = out + fold.shift.repeat_interleave(group, 1)[:, :, None]
        return out, lse if fold.bias is None else lse + fold.bias

    def _attended(self, query: Tensor, state: AttentionState, params: Params) -> tuple[Tensor, Tensor]:
        """Output (B, Hq, Q, D) and log-sum-exp (B, Hq, Q), float32.  Scores and weights are (B, H, rows, tokens), the
        sinks' first: rows of many tokens lie one behind the other in memory."""
        queries = query.shape[2]
        state, span = self._span(state, queries)
        factor = state.scaling if state.softcap is not None else state.scaling * LOG2E
        packed = self._gather(state.pool, state.table, span.low, span.high) if span.high > span.low else None
        score = self._all_scores(self._asked(query, factor, params), packed, state, span, params)
        if state.softcap is not None:
            score = torch.tanh(score / state.softcap) * (state.softcap * LOG2E)
        if span.masked:
            score = torch.where(self._seen(state, queries, self._read(state, span)).mT, score, -torch.inf)
        most = score.amax(-1, keepdim=True) if score.shape[-1] else score.new_full((*score.shape[:-1], 1), -torch.inf)
        weights = torch.exp2(score - most.clamp(min=LOWEST))
        mass = weights.sum(-1, keepdim=True)
        out = self._all_sums(weights, packed, state, span, params) / mass.clamp(min=1.0)  # its largest term is 1
        lse = torch.where(mass > 0, (most + torch.log2(mass)) / LOG2E, -torch.inf)
        return self._heads(out, queries), self._heads(lse, queries)[..., 0]

    def _span(self, state: AttentionState, queries: int) -> tuple[AttentionState, Span]:
        """The state with no more tokens than there are, where the host's maxima are those of a capacity, and which of
        them a call reads; waits for the device, once."""
        numbers = (state.packed_keys, state.packed_values, state.length, state.start, state.first)
        of_all = on_host(numbers)
        keys, values, length, start, first = (min(of_one) for of_one in of_all)
        alike = all(len(set(of_one)) == 1 for of_one in of_all)
        tokens, sinks = self.plan.layout.page_tokens, self.plan.sinks
        if state.longest > max(of_all[2]):
            state = replace(state, longest=max(of_all[2]))
        end = max(0, state.longest - sinks)
        pages = -(-min(state.packed_most, max(of_all[0] + of_all[1]), end) // tokens)
        low = 0
        if state.places is None:
            oldest, newest = start, length + state.ahead  # what the first query sees; the position behind the last one
            if state.window is not None:
                oldest = max(oldest, newest - queries - state.window + 1)
            low = min(pages, end // tokens, max(0, oldest - sinks) // tokens)
        least = 0 if sinks else low * tokens
        masked = not alike or state.places is not None or start > least or queries - state.ahead > 1
        masked = masked or state.window is not None and least <= length + state.ahead - 1 - state.window
        floor = low * tokens
        keys, values = (min(max(count, floor), end) for count in (keys, values))
        return state, Span(low, pages, end, keys, values, first, alike, masked)

    def _dense(self, query: Tensor, state: AttentionState, params: Params) -> tuple[Tensor, Tensor]:
        """The same by decoded numbers, chunk by chunk."""
        queries, sinks, dim = query.shape[2], self.plan.sinks, query.shape[3]
        asked = self._asked(query, state.scaling if state.softcap is not None else state.scaling * LOG2E, params)
        columns = asked.columns
        heads, rows = columns.shape[0] * columns.shape[1], columns.shape[3]
        most = columns.new_full((*columns.shape[:2], 1, rows), -torch.inf)
        mass, total = torch.zeros_like(most), columns.new_zeros(*most.shape[:2], self.plan.values.channels, rows)
        spans = [(-sinks, min(sinks, state.longest) - sinks)] if sinks else []
        for low, high in [*spans, *decoded_chunks(self.plan, state, 4 * heads * (2 * rows + 4 * dim))]:
            u = torch.arange(low, high, device=query.device)
            score = self._products(self._numbers("keys", state, low, high, params), asked, u, state, params)
            if state.softcap is not None:
                score = torch.tanh(score / state.softcap) * (state.softcap * LOG2E)
            score = torch.where(self._seen(state, queries, u), score, -torch.inf)
            higher = torch.maximum(most, score.amax(-2, keepdim=True)) if len(u) else most
            even = torch.where(higher == -torch.inf, 0.0, higher)
            weights, decay = torch.exp2(score - even), torch.exp2(most - even)
            mass = mass * decay + weights.sum(-2, keepdim=True)
            total = total * decay + self._numbers("values", state, low, high, params).mT @ weights
            most = higher
        total = total / torch.where(mass > 0, mass, 1.0)
        lse = torch.where(mass > 0, most + torch.log2(mass), -torch.inf) / LOG2E
        return self._heads(total.mT, queries), self._heads(lse.mT, queries)[..., 0]

    def _products(self, keys: Tensor, asked: Asked, u: Tensor, state: AttentionState, params: Params) -> Tensor:
        """Scores of keys (B, H, tokens, D) of the tokens at u, decoded where they are packed: (B, H, tokens, rows)."""
        score: Tensor = keys @ asked.columns
        if asked.met is None:
            return score
        near, more = among_decoded(self.plan, asked.columns.mT, asked.met.mT, params)
        coded = keys @ near.mT + (0.0 if more is None else more[:, :, None])
        return torch.where(((u >= 0) & (u < state.packed_keys[:, None]))[:, None, :, None], coded, score)

    def _numbers(self, side: Side, state: AttentionState, low: int, high: int, params: Params) -> Tensor:
        """Tokens u in [low, high), sinks or others, decoded where they are packed: float32 (B, H, high - low, D)."""
        keys = side == "keys"
        rows, packed = (state.key_rows, state.packed_keys) if keys else (state.value_rows, state.packed_values)
        if low < 0:
            return self._sinks(state, rows, False)
        u, end = torch.arange(low, high, device=rows.device), min(high, state.packed_most)
        exact = self._exact_rows(state, rows, u, self._alive(state, u, packed))
        if end <= low:
            return exact
        found = self.unpack(side, state.pool, state.table, low, end, params, state.places)
        found = torch.nn.functional.pad(found, (0, 0, 0, high - end))
        return torch.where((u < packed[:, None])[:, None, :, None], found, exact)

    def _read(self, state: AttentionState, span: Span) -> Tensor:
        """The tokens u that a call reads, in the order of scores."""
        sinks, device = min(self.plan.sinks, state.longest), state.length.device
        u = torch.arange(span.low * self.plan.layout.page_tokens, span.end, device=device)
        return torch.cat((torch.arange(-self.plan.sinks, sinks - self.plan.sinks, device=device), u)) if sinks else u

    def _all_scores(
        self, asked: Asked, packed: Tensor | None, state: AttentionState, span: Span, params: Params
    ) -> Tensor:
        """Scores of the sinks, and of the tokens u of a span, by codes or by exact rows."""
        rows, floor, tail = asked.columns.mT, span.low * self.plan.layout.page_tokens, span.end
        found = [rows @ self._sinks(state, state.key_rows, span.alike).mT] if self.plan.sinks else []
        if packed is not None:
            coded = self._scores_of_codes(asked, packed, floor, params, state.places).mT
        if span.alike:
            found += [coded[..., : span.keys - floor]] if span.keys > floor else []
            exact = self._slices(state.key_rows, self.plan.sinks, span.first, span.keys, tail)
            found.append(rows @ exact.mT)
        else:
            u = torch.arange(span.keys, tail, device=rows.device)
            exact = rows @ self._exact_rows(state, state.key_rows, u, self._alive(state, u, state.packed_keys)).mT
            if packed is not None:
                found.append(coded[..., : span.keys - floor])
                late = torch.nn.functional.pad(coded, (0, max(0, tail - floor - coded.shape[-1])))
                late = late[..., span.keys - floor : tail - floor]
                exact = torch.where((u >= state.packed_keys[:, None])[:, None, None], exact, late)
            found.append(exact)
        return torch.cat(found, -1) if len(found) > 1 else found[0]

    def _all_sums(
        self, weights: Tensor, packed: Tensor | None, state: AttentionState, span: Span, params: Params
    ) -> Tensor:
        """Sums of the same tokens' values under weights: (B, H, rows, D)."""
        floor, sinks = span.low * self.plan.layout.page_tokens, min(self.plan.sinks, state.longest)
        found = [weights[..., :sinks] @ self._sinks(state, state.value_rows, span.alike)] if self.plan.sinks else []
        weights = weights[..., sinks:]
        late = weights[..., span.values - floor :]
        if span.alike:
            on_pages = weights[..., : span.values - floor]
            rows = self._slices(state.value_rows, self.plan.sinks, span.first, span.values, span.end)
        else:
            u = torch.arange(floor, span.end, device=weights.device)
            on_pages = torch.where((u < state.packed_values[:, None])[:, None, None], weights, 0.0)
            alive = self._alive(state, u[span.values - floor :], state.packed_values)
            rows = self._exact_rows(state, state.value_rows, u[span.values - floor :], alive)
            late = torch.where(alive[:, None, None], late, 0.0)
        if packed is not None and on_pages.shape[-1]:
            places = packed.shape[1] * self.plan.layout.page_tokens
            on_pages = torch.nn.functional.pad(on_pages[..., :places], (0, max(0, places - on_pages.shape[-1])))
            found.append(self._sums_of_codes(on_pages.mT, packed, params).mT)
        return sum(found, late @ rows)

    def _sinks(self, state: AttentionState, rows: Tensor, alike: bool) -> Tensor:
        """Exact rows of the sinks that there are, float32; 0 those of shorter sequences."""
        held = rows[:, :, : min(self.plan.sinks, state.longest)].to(torch.float32)
        if alike:
            return held
        there = torch.arange(held.shape[2], device=rows.device) < state.length[:, None]
        return torch.where(there[:, None, :, None], held, 0.0)

    def _alive(self, state: AttentionState, u: Tensor, packed: Tensor) -> Tensor:
        """(B, tokens): the token at u is there, and exact."""
        return (u >= packed[:, None]) & (u < (state.length - self.plan.sinks)[:, None])

    def _exact_rows(self, state: AttentionState, rows: Tensor, u: Tensor, alive: Tensor) -> Tensor:
        """Exact rows of the tokens at u, float32 (B, H, tokens, D); rows of tokens that are not alive are 0."""
        ring = rows.shape[2] - self.plan.sinks
        place = self.plan.sinks + torch.remainder(u - state.first[:, None], max(1, ring))
        index = place[:, None, :, None].expand(-1, rows.shape[1], -1, rows.shape[3])
        return torch.where(alive[:, None, :, None], rows.gather(2, index).to(torch.float32), 0.0)

    def _seen(self, state: AttentionState, queries: int, u: Tensor) -> Tensor:
        """(B, H or 1, tokens, rows): does the query row see the token at u."""
        asked = state.length + state.ahead if state.places is None else state.places.asked
        assert asked is not None
        position = (asked - queries)[:, None] + torch.arange(queries, device=u.device)
        return self._sees(state, position.repeat_interleave(self.plan.shape.group, -1), u)

    def _sees(self, state: AttentionState, position: Tensor, u: Tensor) -> Tensor:
        """(B, H or 1, tokens, rows): does a row at position (B, rows) see the token at u."""
        stand = (u + self.plan.sinks)[None, None] if state.places is None else self._positions(u[None], state.places)
        stand, position = stand[..., None], position[:, None, None]
        seen = (stand <= position) & (stand >= state.start[:, None, None, None])
        seen = seen & ((u + self.plan.sinks) < state.length[:, None])[:, None, :, None]
        return seen if state.window is None else seen & (stand > position - state.window)


def _by_stored(x: Tensor, together: int) -> Tensor:
    """Columns that heads have for the numbers of all G heads that are rotated together, (B, H, G n, rows), as columns
    that each of those meets: (B, H, n, G rows).  So what is stored of a head is read once for all."""
    parts = x.unflatten(1, (-1, together)).unflatten(3, (together, -1))
    return parts.permute(0, 1, 3, 4, 2, 5).flatten(4).flatten(1, 2)


def _by_reader(x: Tensor, together: int) -> Tensor:
    """The inverse of `_by_stored`: (B, H, n, G rows) as (B, H, G n, rows)."""
    parts = x.unflatten(1, (-1, together)).unflatten(4, (together, -1))
    return parts.permute(0, 1, 4, 2, 3, 5).flatten(3, 4).flatten(1, 2)
