"""One token more of every sequence, by what is on the device alone: no length is known to the host."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .kernels import Module, Params, Room, Side

if TYPE_CHECKING:
    from torch import Tensor


def write_token(rows: Tensor, fresh: Tensor, length: Tensor, sinks: int) -> None:
    """Put fresh (B, H, 1, D), token t = length_b - 1 of sequence b, into its row of (B, H, sinks + ring, D)."""
    import torch

    t, ring = length.long() - 1, rows.shape[2] - sinks
    row = torch.where(t < sinks, t, sinks + (t - sinks) % ring)
    rows.scatter_(2, row[:, None, None, None].expand_as(fresh), fresh.to(rows.dtype))


def pack_due(module: Module, side: Side, into: Room, params: Params, sinks: int, page_tokens: int) -> None:
    """Pack what is due of one side.

    Every sequence is counted from the beginning of the page that its first due token belongs to, so that the same few
    blocks are looked at whatever lengths are.  Codes do not depend on where a token stands, but for rotary positions.
    """
    import torch

    begin, end = into.packed[side], into.due[side]
    origin = begin // page_tokens * page_tokens
    pages = -(-(page_tokens - 1 + into.most[side]) // page_tokens)
    places = (origin // page_tokens)[:, None] + torch.arange(pages + 1, device=begin.device)
    table = into.table.gather(1, places.clamp(max=into.table.shape[1] - 1))
    reach = (0, pages * page_tokens)
    module.pack(side, into.rows(side), -origin, sinks, begin - origin, end - origin, reach, into.pool, table, params)
