"""One token more of every sequence, by what is on the device alone: no length is known to the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .kernels import Params, Room, Side

if TYPE_CHECKING:
    from torch import Tensor


def write_token(rows: Tensor, fresh: Tensor, length: Tensor, sinks: int) -> None:
    """Put fresh (B, H, 1, D), token t = length_b - 1 of sequence b, into its row of (B, H, sinks + ring, D)."""
    import torch

    t, ring = length.long() - 1, rows.shape[2] - sinks
    row = torch.where(t < sinks, t, sinks + (t - sinks) % ring)
    rows.scatter_(2, row[:, None, None, None].expand_as(fresh), fresh.to(rows.dtype))


def pack_due(pack: Callable[..., None], side: Side, into: Room, params: Params, sinks: int, page_tokens: int) -> None:
    """Pack what is due of one side by a Module's `pack`: the same few blocks are looked at whatever lengths are; none
    where nothing can be due."""
    if not into.most[side]:
        return
    begin, end, most = into.packed[side], into.due[side], into.most[side]
    pages = -(-(page_tokens - 1 + most) // page_tokens)
    first, begin, end, table = from_own_pages(into.table, page_tokens, pages, 0, begin, end)
    reach = (0, pages * page_tokens)
    pack(side, into.rows(side), first, sinks, begin, end, reach, into.pool, table, params)


def from_own_pages(
    table: Tensor, page_tokens: int, pages: int, first: Tensor | int, begin: Tensor, end: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(first, begin, end, table) of `KernelSet.pack`, every sequence counted from the beginning of the page that its
    begin_b belongs to, so that all stand side by side in `pages` pages, wherever they are.

    Codes do not depend on where a token stands, but for rotary positions.
    """
    import torch

    page = begin // page_tokens
    origin = page * page_tokens
    places = page[:, None] + torch.arange(pages + 1, device=begin.device)
    near = table.gather(1, places.clamp(max=table.shape[1] - 1))
    return first - origin, begin - origin, end - origin, near
