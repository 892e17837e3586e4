"""Chunks of tokens that wait to be packed, or are decoded for many queries, so that working memory has a bound."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kvdsl.kernels import AttentionState

from .plan import Plan

WORKING = 1 << 28  # bytes that attention to decoded tokens takes at a time


def decoded_chunks(plan: Plan, state: AttentionState, bytes_a_token: int) -> Iterator[tuple[int, int]]:
    """Spans of tokens u, cut at whole pages, that fit WORKING; those behind the packed ones are with the last."""
    page, end = plan.layout.page_tokens, max(0, state.longest - plan.sinks)
    size = max(1, WORKING // max(1, bytes_a_token) // page) * page
    cuts = [*range(0, max(1, min(state.packed_most, end)), size), end]
    return zip(cuts, cuts[1:], strict=False)


def rows_of(rows: Tensor, first: Tensor, offset: int, low: int, high: int) -> Tensor:
    """Tokens u in [low, high) of every sequence of rows (B, H, total, D), float32 (B, H, high - low, D); those that are
    not there are any."""
    u = torch.arange(low, high, device=rows.device)
    place = offset + torch.remainder(u - first[:, None], rows.shape[2] - offset)
    index = place[:, None, :, None].expand(-1, rows.shape[1], -1, rows.shape[3])
    return rows.gather(2, index).to(torch.float32)


def mapping(rows: Tensor, first: Tensor, offset: int, begin: Tensor, end: Tensor, reach: tuple[int, int],
            numbers: int, *, seen: bool) -> dict[str, Any]:  # fmt: skip
    """What a kernel takes that makes so many numbers each of rows (B, H, total, D) of the tokens u in `reach`, as far
    as they are in [begin, end); `out_ptr` is where these will be, float32 (B, H, tokens, numbers).  `seen`: the host
    looks at all tokens, also at those that are not there: 0."""
    total, (low, high) = rows.shape[2], reach
    made = torch.zeros if seen else torch.empty
    out = made(*rows.shape[:2], high - low, numbers, dtype=torch.float32, device=rows.device)
    return {
        "rows_ptr": rows, "source_ptr": rows, "coded_ptr": rows, "first_ptr": first, "begin_ptr": begin, "end_ptr": end,
        "out_ptr": out, "total_rows": total, "offset": offset, "ring": total - offset, "low": low, "count": high - low,
    }  # fmt: skip
