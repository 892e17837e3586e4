"""The attention that tokens receive, on the torch backend: spans of tokens and rows at a time, so that few scores are
held at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kvdsl.kernels import AttentionState, Params

from .run_queries import Asked
from .run_torch import TorchModule
from .run_torch_pages import PACK_AT_ONCE

Scores = Callable[[Asked], Tensor]
SCORES_AT_ONCE = 1 << 22  # of all heads and sequences


class TorchReceived(TorchModule):
    """All functions of one generated module."""

    def reach(self, query: Tensor, position: Tensor, state: AttentionState, params: Params) -> Tensor:
        """See KernelSet."""
        found = torch.full(query.shape[:3], -torch.inf, dtype=torch.float32, device=query.device)
        for u, scores in self._spans(state, params):
            for rows in self._chunks(query, len(u)):
                score = self._seen_scores(query[:, :, rows], position[:, rows], u, scores, state, params)
                lse = self._heads(score.logsumexp(-2)[..., None], query[:, :, rows].shape[2])[..., 0]
                found[:, :, rows] = torch.logaddexp(found[:, :, rows], lse)
        return found

    def received(
        self, query: Tensor, position: Tensor, lse: Tensor, state: AttentionState, params: Params
    ) -> tuple[Tensor, Tensor]:
        """See KernelSet."""
        size = (query.shape[0], self.plan.shape.kv_heads, state.longest)
        first, second = (torch.zeros(size, dtype=torch.float32, device=query.device) for _ in range(2))
        grouped = lse.unflatten(1, (self.plan.shape.kv_heads, -1)).movedim(2, 3)  # (B, H, P, group)
        for u, scores in self._spans(state, params):
            there = slice(int(u[0]) + self.plan.sinks, int(u[-1]) + self.plan.sinks + 1)
            for rows in self._chunks(query, len(u)):
                score = self._seen_scores(query[:, :, rows], position[:, rows], u, scores, state, params)
                sums = grouped[:, :, rows].flatten(2)[:, :, None]
                share = torch.where((score == -torch.inf) | (sums == -torch.inf), 0.0, torch.exp(score - sums))
                first[:, :, there] += share.sum(-1)
                second[:, :, there] += share.square().sum(-1)
        return first, second

    def _chunks(self, query: Tensor, tokens: int) -> list[slice]:
        """Query rows whose scores of so many tokens are few enough."""
        batch, heads, rows, _ = query.shape
        size = max(1, SCORES_AT_ONCE // max(1, batch * heads * tokens))
        return [slice(at, min(at + size, rows)) for at in range(0, rows, size)]

    def _spans(self, state: AttentionState, params: Params) -> Iterator[tuple[Tensor, Scores]]:
        """Tokens u, and the function that gives their scores (B, H, tokens, rows)."""
        sinks, tokens, device = self.plan.sinks, self.plan.layout.page_tokens, state.pool.device
        u = torch.arange(-sinks, min(0, state.longest - sinks), device=device)
        if len(u):
            held = self._sinks(state, state.key_rows, alike=False)

            def of_sinks(asked: Asked, held: Tensor = held) -> Tensor:
                return held @ asked.columns

            yield u, of_sinks
        least = int(state.packed_keys.min()) if len(state.packed_keys) else 0
        for low in range(0, max(0, state.longest - sinks), PACK_AT_ONCE * tokens):
            u = torch.arange(low, min(low + PACK_AT_ONCE * tokens, state.longest - sinks), device=device)
            pages = -(-min(state.packed_most, int(u[-1]) + 1) // tokens)
            packed = self._gather(state.pool, state.table, low // tokens, pages) if pages * tokens > low else None
            exact = u >= state.packed_keys[:, None]
            rows = self._exact_rows(state, state.key_rows, u, self._alive(state, u, state.packed_keys))

            def scores(
                asked: Asked, packed: Tensor | None = packed, low: int = low, exact: Tensor = exact,
                rows: Tensor = rows, all_packed: bool = int(u[-1]) < least,
            ) -> Tensor:  # fmt: skip
                if packed is None:
                    return rows @ asked.columns
                coded = self._scores_of_codes(asked, packed, low, params, state.places)[:, :, : exact.shape[1]]
                if all_packed:
                    return coded
                coded = torch.nn.functional.pad(coded, (0, 0, 0, exact.shape[1] - coded.shape[2]))
                return torch.where(exact[:, None, :, None], rows @ asked.columns, coded)

            yield u, scores

    def _seen_scores(
        self, query: Tensor, position: Tensor, u: Tensor, scores: Scores, state: AttentionState, params: Params
    ) -> Tensor:
        """Scores (B, H, tokens, rows) of query rows for the tokens at u, -inf where a row does not see one."""
        score = scores(self._asked(query, state.scaling, params))
        if state.softcap is not None:
            score = torch.tanh(score / state.softcap) * state.softcap
        last = position if state.places is not None else torch.minimum(position, state.length[:, None] - 1)
        seen = self._sees(state, last.repeat_interleave(self.plan.shape.group, -1), u)
        return torch.where(seen, score, -torch.inf)
