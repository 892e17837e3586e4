"""The exact tokens of a cache: where they stand in the row buffers, and the index arithmetic of moving them.

A row buffer is (B, H, sinks + ring, D): token t < sinks is row t, token u = t - sinks is row sinks + u % ring.  A chunk
that is too large for the ring is attended from a temporary buffer of the same form whose ring starts at `first`.
Index tensors are computed on the host from host integers, so nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def column(values: Sequence[int]) -> Tensor:
    """Host integers as an int64 column (B, 1)."""
    return torch.tensor(values, dtype=torch.int64, device="cpu")[:, None]


def gather(source: Tensor, index: Tensor) -> Tensor:
    """source (B, H, N, D), index (B, L) on the host -> (B, H, L, D)."""
    if source.device.type == "cuda":
        index = index.contiguous().pin_memory().to(source.device, non_blocking=True)
    batch, heads, _, dim = source.shape
    return source.gather(2, index[:, None, :, None].expand(batch, heads, -1, dim))


def runs(begin: int, end: int, sinks: int, ring: int) -> Iterator[tuple[int, int, int]]:
    """Tokens t in [begin, end) as pieces (first token, first row, count) of neighbouring rows."""
    while begin < end:
        row = begin if begin < sinks else sinks + (begin - sinks) % ring
        border = sinks if begin < sinks else sinks + ring
        count = min(end - begin, border - row)
        yield begin, row, count
        begin += count


def write(rows: Tensor, fresh: Tensor, sinks: int, begins: Sequence[int], counts: Sequence[int]) -> None:
    """Put the last counts_b tokens of fresh (B, H, m, D) into rows as tokens begins_b, begins_b + 1, ...."""
    ring, chunk = rows.shape[2] - sinks, fresh.shape[2]
    if len(set(begins)) == 1 and len(set(counts)) == 1:
        for token, row, count in runs(begins[0], begins[0] + counts[0], sinks, ring):
            at = chunk - counts[0] + token - begins[0]
            rows[:, :, row : row + count].copy_(fresh[:, :, at : at + count])
        return
    places = [
        (b, row + i, chunk - count + token + i - begin)
        for b, (begin, count) in enumerate(zip(begins, counts, strict=True))
        for token, row, size in runs(begin, begin + count, sinks, ring)
        for i in range(size)
    ]
    if places:
        index = torch.tensor(places, dtype=torch.int64, device="cpu").T.contiguous()
        if rows.device.type == "cuda":
            index = index.pin_memory().to(rows.device, non_blocking=True)
        batch, row_at, token_at = index
        rows.transpose(1, 2)[batch, row_at] = fresh.transpose(1, 2)[batch, token_at]


def chunk_index(
    sinks: int, ring: int, chunk: int, begins: Sequence[int], counts: Sequence[int], firsts: Sequence[int]
) -> Tensor:
    """Where each row of a temporary buffer [sinks | old tail | chunk] stands in [row buffer | chunk]: (B, L)."""
    begin, count, first = column(begins), column(counts), column(firsts)
    longest = max(n + c - sinks - f for n, c, f in zip(begins, counts, firsts, strict=True))
    x = torch.arange(sinks + max(1, longest), device="cpu")[None]
    token = torch.where(x < sinks, x, x + first)
    old = torch.where(token < sinks, token, sinks + (token - sinks) % ring)
    new = sinks + ring + (chunk - count) + (token - begin)
    return torch.where(token < begin, old, new).clamp(max=sinks + ring + chunk - 1)


def ring_index(sinks: int, ring: int, lengths: Sequence[int], firsts: Sequence[int], source_ring: int) -> Tensor:
    """Where the newest tokens of a buffer of `source_ring` (its ring starting at firsts) go in a ring of `ring`: (B,
    L)."""
    end = (column(lengths) - sinks).clamp(min=0)
    x = torch.arange(sinks + ring, device="cpu")[None]
    u = end - 1 - (end - 1 - (x - sinks)) % ring
    behind = u - column(firsts)
    return torch.where(x < sinks, x, torch.where(behind < 0, 0, sinks + behind % source_ring))


def dense_index(
    sinks: int, ring: int, decoded: int, lengths: Sequence[int], packed: Sequence[int], gone: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Where each token stands in [decoded | row buffer], right aligned: (B, longest), and which places hold a token
    that is still there (u >= gone_b)."""
    longest = max(lengths, default=0)
    token = torch.arange(longest, device="cpu")[None] - (longest - column(lengths))
    u = token - sinks
    place = torch.where(u < column(packed), u, decoded + sinks + u % ring)
    place = torch.where(token < sinks, decoded + token, place)
    held = (token >= 0) & ((token < sinks) | (u >= column(gone)))
    return torch.where(held, place, 0), held


def live_index(sinks: int, ring: int, lengths: Sequence[int], packed: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Sequence and row of every token that is exact, sequence by sequence in order: two (tokens,) on the host."""
    places = [
        (b, row + i)
        for b, (length, done) in enumerate(zip(lengths, packed, strict=True))
        for begin, end in ((0, min(sinks, length)), (sinks + done, length))
        for _, row, count in runs(begin, end, sinks, ring)
        for i in range(count)
    ]
    index = torch.tensor(places, dtype=torch.int64, device="cpu").view(-1, 2)
    return index[:, 0], index[:, 1]
