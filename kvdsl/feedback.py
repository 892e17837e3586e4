"""Errors of keys that are fed forward before these are packed, as `Feedback` says: what a sequence's queries weigh, and
the keys that are packed in place of those that came.

Whatever packs and reads the tier's pages rounds the blocks, too: a block of channels is packed with all others into
pages that are thrown away, and what these decode to is its error.  No kernel knows of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .encoding import Feedback
from .kernels import KernelSet, Params, Places
from .measuring import LARGEST, saturated

QUERIES = 1 << 12  # whose products are added up at a time
SCRATCH = 1 << 26  # bytes of keys in float64 that are at hand at a time


def weighed(part: Feedback, query: Tensor, heads: int) -> Tensor:
    """The largest directions of queries (B, Hq, Q, D), of all that meet one of `heads` kv heads together, each times
    its singular value: float32 (B, heads, rank, D).  The first ones that there are not are zeros."""
    moment = torch.zeros(
        query.shape[0], heads, query.shape[3], query.shape[3], dtype=torch.float64, device=query.device
    )
    for some in query.split(QUERIES, 2):
        rows = saturated(some).to(torch.float64).unflatten(1, (heads, -1)).flatten(2, 3)
        moment += rows.mT @ rows
    squares, directions = torch.linalg.eigh(moment)
    sizes = squares[..., -part.rank :].clamp(min=0).sqrt()
    return (directions[..., -part.rank :].mT * sizes[..., None]).to(torch.float32)


def fed(part: Feedback, weights: Tensor, keys: Tensor, decoded: Callable[[Tensor], Tensor], page: int) -> Tensor:
    """The keys that are packed in place of keys (B, H, T, D), under `weights` as `weighed` gives them: float32, and a
    tensor of their own.

    decoded   what is read of such keys where they are packed
    page      tokens that these may be cut at
    """
    each = 8 * keys[:, :, :1].numel()
    span = max(1, SCRATCH // max(1, each) // page) * page
    found = [_fed(part, weights.to(torch.float64), some, decoded) for some in keys.split(span, 2)]
    return torch.cat(found, 2)


def _fed(part: Feedback, weights: Tensor, keys: Tensor, decoded: Callable[[Tensor], Tensor]) -> Tensor:
    keys = keys.to(torch.float32).clamp(-LARGEST, LARGEST)
    one = torch.eye(weights.shape[2], dtype=torch.float64, device=weights.device)
    for end in range(part.channels, keys.shape[3], part.channels):
        block, rest = weights[..., end - part.channels : end], weights[..., end:]
        answer = part.weight * rest.mT @ torch.linalg.solve(one + part.weight * rest @ rest.mT, block)
        known = keys[..., end - part.channels : end]
        error = (decoded(keys)[..., end - part.channels : end].to(torch.float64) - known).nan_to_num(0.0, 0.0, 0.0)
        moved = (keys[..., end:] - error @ answer.mT).to(torch.float32).clamp(-LARGEST, LARGEST)
        keys = torch.cat([keys[..., :end], moved], -1)
    return keys


def trip(kernels: KernelSet, keys: Tensor, params: Params) -> Tensor:
    """What is read of keys (B, H, T, D), whole blocks, packed into pages of nobody: float32."""
    batch, heads, tokens, _ = keys.shape
    pages = -(-tokens // kernels.page_tokens)
    pool = torch.zeros(max(1, batch * pages), kernels.page_bytes, dtype=torch.uint8, device=keys.device)
    table = torch.zeros(batch, pages + 1, dtype=torch.int32, device=keys.device)
    table[:, :pages] = torch.arange(batch * pages, dtype=torch.int32, device=keys.device).view(batch, pages)
    begin = torch.zeros(batch, dtype=torch.int32, device=keys.device)
    end = torch.full_like(begin, tokens)
    anywhere = Places(begin.new_zeros(batch, heads, pages * kernels.page_tokens), 1) if kernels.shape.placed else None
    kernels.pack("keys", keys.contiguous(), begin, 0, begin, end, (0, tokens), pool, table, params, anywhere)
    return kernels.unpack("keys", pool, table, 0, tokens, params, anywhere)
