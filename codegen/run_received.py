"""The attention that tokens receive, with generated Triton kernels: grids, and the merge of log-sum-exps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvdsl.kernels import AttentionState, Params

from .run_triton import TritonModule


class TritonReceived(TritonModule):
    """All kernels of one generated module."""

    def _asking(self, query: Tensor, position: Tensor, state: AttentionState, params: Params) -> dict[str, Any]:
        """The arguments that both kernels share."""
        return {**self._reading(query, state, params), "position_ptr": position.contiguous()}

    def _edge_tiles(self, state: AttentionState) -> int:
        """At most this many tiles hold tokens of no page that is packed throughout: the sinks, what the ring has room
        for, and packed tokens of one page more."""
        size, sinks = self.plan.edge_tile, self.plan.sinks
        room = state.key_rows.shape[2] - sinks + self.plan.layout.page_tokens
        return -(-sinks // size) + -(-max(0, min(room, state.longest - sinks)) // size)

    def reach(self, query: Tensor, position: Tensor, state: AttentionState, params: Params) -> Tensor:
        """See KernelSet.  As many programs share a sequence as the machine has room for."""
        batch, heads, queries, _ = query.shape
        blocks = -(-queries * self.plan.shape.group // self.plan.rows(many=True))
        programs = batch * self.plan.shape.kv_heads
        splits = self.splits(programs * blocks, state.longest)
        edges = max(1, min(self._edge_tiles(state), 2 * self.processors() // max(1, programs * blocks)))
        out = torch.empty(splits + edges, batch, heads, queries, dtype=torch.float32, device=query.device)
        given = self._asking(query, position, state, params)
        given |= {"splits": splits, "edge_splits": edges, "out_ptr": out}
        self._run("reach", (programs, splits + edges, blocks), given, state.pool, params)
        return out.logsumexp(0)

    def received(
        self, query: Tensor, position: Tensor, lse: Tensor, state: AttentionState, params: Params
    ) -> tuple[Tensor, Tensor]:
        """See KernelSet.  One program adds up all that a tile of tokens receives, so sums have one order."""
        programs = query.shape[0] * self.plan.shape.kv_heads
        size = (query.shape[0], self.plan.shape.kv_heads, state.longest)
        first, second = (torch.empty(size, dtype=torch.float32, device=query.device).zero_() for _ in range(2))
        tiles = min(state.packed_most, state.longest) // self.plan.layout.page_tokens
        tiles *= self.plan.page_tiles
        given = self._asking(query, position, state, params)
        given |= {"tiles": tiles, "longest": state.longest, "lse_ptr": lse.contiguous()}
        given |= {"sum_ptr": first, "square_ptr": second}
        self._run("received", (programs, tiles + self._edge_tiles(state)), given, state.pool, params)
        return first, second
