"""The torch backend: pages gathered and scattered, windows and masks, around the generated functions.

It runs on any device.  Working memory grows with the packed tokens that a call reads; the pool itself is never copied.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvdsl.kernels import AttentionState, Fold, Form, Params, Places, Segments, Side
from kvdsl.spaces import applied

from .chunks import WORKING, decoded_chunks
from .host_beside import met_at
from .host_channels import queries
from .plan import SidePlan
from .run_torch_pages import TorchPages

LOG2E = 1.4426950408889634


class TorchModule(TorchPages):
    """The functions of one generated module, bound to pools and tables."""

    def _rows(self, query: Tensor, factor: float) -> Tensor:
        """Query (B, Hq, Q, D) as columns (B, H, D, Q * group), float32, scaled."""
        batch, _, queries, dim = query.shape
        grouped = query.to(torch.float32).mul(factor).unflatten(1, (self.plan.shape.kv_heads, -1))
        return grouped.movedim(2, 3).reshape(batch, self.plan.shape.kv_heads, queries * self.plan.shape.group, dim).mT

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
        score = self._scores_of_codes(self._rows(query, 1.0), self._gather(pool, table, 0, pages), 0, params, places)
        return self._heads(score.mT[..., :tokens], queries)

    def _scores_of_codes(
        self, columns: Tensor, pages: Tensor, first: int, params: Params, places: Places | None = None
    ) -> Tensor:
        """q.k of the tokens of pages (B, pages, page_bytes), packed from u = first on, for queries (B, H, D, rows): the
        query is mapped, not the keys, but for rotary positions and what is behind them."""
        if self.plan.keys.rope is not None:
            decoded, *others = (
                getattr(self.module, f"unpack_{part.space}")(*self._inputs(part, pages, params))
                for part in self.plan.keys.spaces
            )
            if self.plan.keys.mapped:
                decoded = applied(params["keys.decode"], decoded)
            if self.plan.keys.shifted:
                decoded = decoded + params["keys.decode_shift"][:, None]
            return self._placed(sum(others, decoded), first, params, torch.float32, places) @ columns
        first_score, *others = (self._term_scores(term, columns, pages, params) for term in self.plan.keys.spaces)
        return sum(others, first_score)

    def _term_scores(self, term: SidePlan, columns: Tensor, pages: Tensor, params: Params) -> Tensor:
        if term.masked:
            decode, channels = params[f"{term.home}.decode"], self._channels(term, pages)
            met = queries(columns, decode, channels, top=term.store.gathers)
            return getattr(self.module, term.product)(met, *self._inputs(term, pages, params))
        if term.beside:
            met = met_at(columns, self._channels(term, pages))
            return getattr(self.module, term.product)(met, *self._inputs(term, pages, params))
        met = params[f"{term.home}.decode"].mT @ columns if term.mapped else columns
        met = _by_stored(met, term.joined)
        score: Tensor = getattr(self.module, term.product)(met, *self._inputs(term, pages, params))
        score = _by_reader(score, term.joined).unflatten(2, (term.joined, -1)).sum(2)
        return score + (params[f"{term.home}.decode_shift"][:, None] @ columns) if term.shifted else score

    def _sums_of_codes(self, weights: Tensor, pages: Tensor, params: Params) -> Tensor:
        """Sums of packed values under weights (B, H, tokens, rows), as vectors of the head: (B, H, D, rows)."""
        total, *others = (self._term_sums(term, weights, pages, params) for term in self.plan.values.spaces)
        return sum(others, total)

    def _term_sums(self, term: SidePlan, weights: Tensor, pages: Tensor, params: Params) -> Tensor:
        every = _by_stored(weights.repeat(1, 1, term.joined, 1), term.joined)
        total = _by_reader(getattr(self.module, term.product)(every, *self._inputs(term, pages, params)), term.joined)
        if term.mapped:
            total = params[f"{term.home}.decode"] @ total
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
        """See KernelSet; `splits` is a matter of the GPU, and only asks for products of codes here."""
        out, lse = self._read(query, state, params, splits, form)
        return out.to(query.dtype), lse

    def union(
        self, query: Tensor, segments: Segments, splits: int | None = None, form: Form | None = None
    ) -> tuple[Tensor, Tensor]:
        found = [
            module._read(query, state, params, splits, form)
            if fold is None
            else module._folded(fold, state, params, splits, form)
            for module, state, params, fold in segments
        ]
        out, lse = (torch.stack(each) for each in zip(*found, strict=True))
        whole = torch.logsumexp(lse, 0)
        weights = torch.exp(lse - torch.where(whole == -torch.inf, 0.0, whole))
        return (out * weights[..., None]).sum(0).to(query.dtype), whole

    def _read(
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
        out, lse = self._read(fold.query, state, params, splits, form)
        group = self.plan.shape.group
        if fold.factor is not None:
            out = out * fold.factor.repeat_interleave(group, 1)[:, :, None]
        if fold.shift is not None:
            out = out + fold.shift.repeat_interleave(group, 1)[:, :, None]
        return out, lse if fold.bias is None else lse + fold.bias

    def _attended(self, query: Tensor, state: AttentionState, params: Params) -> tuple[Tensor, Tensor]:
        """Output (B, Hq, Q, D) and log-sum-exp (B, Hq, Q), float32."""
        queries, tokens, sinks = query.shape[2], self.plan.layout.page_tokens, self.plan.sinks
        factor = state.scaling if state.softcap is not None else state.scaling * LOG2E
        columns = self._rows(query, factor)
        end = max(0, state.longest - sinks)
        pages = -(-min(state.packed_most, end) // tokens)
        low = self._first_page(state, queries, min(pages, end // tokens))
        exact_from = max(low * tokens, int(torch.minimum(state.packed_keys, state.packed_values).min()))
        exact_from = min(exact_from, end)
        u = torch.arange(low * tokens, end, device=query.device)
        coded = max(0, min(pages * tokens, end) - low * tokens)

        score = columns.new_full((*columns.shape[:2], len(u), columns.shape[-1]), -torch.inf)
        if coded:
            packed = self._gather(state.pool, state.table, low, pages)
            found = self._scores_of_codes(columns, packed, low * tokens, params, state.places)
            score[:, :, :coded] = found[:, :, :coded]
        tail = slice(exact_from - low * tokens, len(u))
        alive = self._alive(state, u[tail], state.packed_keys)
        exact = self._exact_rows(state, state.key_rows, u[tail], alive) @ columns
        score[:, :, tail] = torch.where(
            (u[tail] >= state.packed_keys[:, None])[:, None, :, None], exact, score[:, :, tail]
        )
        first = self._exact_rows(state, state.key_rows, torch.arange(-sinks, 0, device=query.device), None) @ columns
        score = torch.cat((first, score), -2)
        if state.softcap is not None:
            score = torch.tanh(score / state.softcap) * (state.softcap * LOG2E)
        u = torch.cat((torch.arange(-sinks, 0, device=query.device), u))
        score = torch.where(self._seen(state, queries, u), score, -torch.inf)

        most = score.amax(-2, keepdim=True) if score.shape[-2] else score.new_full((1, 1, 1, 1), -torch.inf)
        weights = torch.exp2(score - torch.where(most == -torch.inf, 0.0, most))
        mass = weights.sum(-2)
        on_sinks, weights = weights.split((sinks, score.shape[-2] - sinks), -2)
        out = self._exact_rows(state, state.value_rows, u[:sinks], None).mT @ on_sinks
        u = u[sinks:]
        on_pages = torch.where((u < state.packed_values[:, None])[:, None, :, None], weights, 0.0)
        if coded:
            rest = pages * tokens - low * tokens - coded
            on_pages = torch.nn.functional.pad(on_pages[:, :, :coded], (0, 0, 0, rest))
            out = out + self._sums_of_codes(on_pages, packed, params)
        alive = self._alive(state, u[tail], state.packed_values)
        on_rows = torch.where(alive[:, None, :, None], weights[:, :, tail], 0.0)
        out = out + self._exact_rows(state, state.value_rows, u[tail], alive).mT @ on_rows
        out = out / torch.where(mass > 0, mass, 1.0)[..., None, :]
        lse = (most[..., 0, :] + torch.log2(mass)) / LOG2E
        lse = torch.where(mass > 0, lse, -torch.inf) if score.shape[-2] else torch.full_like(mass, -torch.inf)
        return self._heads(out.mT, queries), self._heads(lse[..., None], queries)[..., 0]

    def _dense(self, query: Tensor, state: AttentionState, params: Params) -> tuple[Tensor, Tensor]:
        """The same by decoded numbers, chunk by chunk."""
        queries, sinks, dim = query.shape[2], self.plan.sinks, query.shape[3]
        columns = self._rows(query, state.scaling if state.softcap is not None else state.scaling * LOG2E)
        heads, rows = columns.shape[0] * columns.shape[1], columns.shape[3]
        most = columns.new_full((*columns.shape[:2], 1, rows), -torch.inf)
        mass, total = torch.zeros_like(most), torch.zeros_like(columns)
        spans = [(-sinks, 0)] if sinks else []
        for low, high in [*spans, *decoded_chunks(self.plan, state, 4 * heads * (2 * rows + 4 * dim))]:
            u = torch.arange(low, high, device=query.device)
            score = self._numbers("keys", state, low, high, params) @ columns
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

    def _numbers(self, side: Side, state: AttentionState, low: int, high: int, params: Params) -> Tensor:
        """Tokens u in [low, high), sinks or others, decoded where they are packed: float32 (B, H, high - low, D)."""
        keys = side == "keys"
        rows, packed = (state.key_rows, state.packed_keys) if keys else (state.value_rows, state.packed_values)
        u = torch.arange(low, high, device=rows.device)
        exact = self._exact_rows(state, rows, u, None if low < 0 else self._alive(state, u, packed))
        end = min(high, state.packed_most)
        if end <= low or low < 0:
            return exact
        found = self.unpack(side, state.pool, state.table, low, end, params, state.places)
        found = torch.nn.functional.pad(found, (0, 0, 0, high - end))
        return torch.where((u < packed[:, None])[:, None, :, None], found, exact)

    def _first_page(self, state: AttentionState, queries: int, last: int) -> int:
        """The first page that any query of any sequence may see; `last` where a window begins behind all tokens."""
        if state.places is not None:
            return 0
        oldest = state.start
        if state.window is not None:
            oldest = torch.maximum(oldest, state.length + state.ahead - queries - state.window + 1)
        return min(last, max(0, int(oldest.min()) - self.plan.sinks) // self.plan.layout.page_tokens)

    def _alive(self, state: AttentionState, u: Tensor, packed: Tensor) -> Tensor:
        """(B, tokens): the token at u is there, and exact."""
        return (u >= packed[:, None]) & (u < (state.length - self.plan.sinks)[:, None])

    def _exact_rows(self, state: AttentionState, rows: Tensor, u: Tensor, alive: Tensor | None) -> Tensor:
        """Exact rows of the tokens at u, float32 (B, H, tokens, D); rows of tokens that are not alive are 0."""
        if alive is None:  # sinks: rows from the first on, those beyond a short sequence 0
            sinks = self.plan.sinks
            there = (u + sinks < state.length[:, None])[:, None, :, None]
            return torch.where(there, rows[:, :, :sinks].to(torch.float32), 0.0)
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
