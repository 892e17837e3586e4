"""Attention of one rank over its own tokens of a longer sequence, which stand between those of other ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .kernels import AttentionState
from .pages import upload
from .quantized_cache import QuantizedCache
from .rows import gather
from .spread import Piece


def seen_here(
    cache: QuantizedCache, query: Tensor, state: AttentionState, pieces: Sequence[Sequence[Piece]], hidden: int
) -> tuple[Tensor, Tensor]:
    """Attention of query (B, Hq, Q, D) over a rank's cache, whose first `hidden` tokens are nobody's: (out, lse) as of
    KernelSet.attend; zeros and -inf where a query sees no token here.  `pieces`: what the queries of each sequence see.

    Tokens of a rank are one behind the other, whatever stood between them: queries that see a token less each are
    causal attention of a shorter state, and those that see all of it stand behind it.  Sequences that are cut alike
    share a launch, which one token a step always is.
    """
    out, lse = torch.zeros_like(query), query.new_full(query.shape[:3], -torch.inf, dtype=torch.float32)
    if not query.numel():
        return out, lse
    scheme, alike = cache.kernels.scheme, dict[tuple[tuple[int, int, int], ...], list[int]]()
    for b, own in enumerate(pieces):
        cut = tuple((one.first, one.last, one.behind if one.last - one.first > 1 else 0) for one in own)
        alike.setdefault(cut, []).append(b)
    for cut, members in alike.items():
        where = slice(None) if len(members) == len(pieces) else members
        some = state if len(members) == len(pieces) else _chosen(state, members)
        for number, (first, last, behind) in enumerate(cut):
            seen = [pieces[b][number].seen + hidden for b in members]
            if max(seen) > hidden:
                whole = seen == [cache.lengths[b] for b in members]
                part = some if whole else _shortened(some, seen, scheme.sinks.tokens if scheme.sinks else 0)
                asked = query[where, :, first:last].contiguous()
                found = cache.kernels.attend(asked, replace(part, ahead=behind), cache.params, cache.splits)
                out[where, :, first:last], lse[where, :, first:last] = found
    return out, lse


def taken(keys: Tensor, values: Tensor, share: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """The tokens at these places of each sequence, right aligned."""
    first, most = share[0] if share else (), max(map(len, share), default=0)
    if all(one == first for one in share) and len(first) == (first[-1] - first[0] + 1 if first else 0):
        begin = first[0] if first else 0
        return keys[:, :, begin : begin + most], values[:, :, begin : begin + most]
    index = torch.tensor([[0] * (most - len(one)) + list(one) for one in share], dtype=torch.int64)
    return gather(keys, index), gather(values, index)


def _chosen(state: AttentionState, members: Sequence[int]) -> AttentionState:
    """Some sequences of a state."""
    names = ("table", "packed_keys", "packed_values", "length", "key_rows", "value_rows", "first", "start")
    at = upload(members, state.length.device, torch.int64)
    return replace(state, **{name: getattr(state, name).index_select(0, at) for name in names})


def _shortened(state: AttentionState, lengths: Sequence[int], sinks: int) -> AttentionState:
    """The state of which each sequence has its first lengths_b tokens alone."""
    most = max(lengths)
    length = upload(lengths, state.length.device)
    packed = (length - sinks).clamp(min=0)
    return replace(
        state,
        length=length,
        packed_keys=torch.minimum(state.packed_keys, packed),
        packed_values=torch.minimum(state.packed_values, packed),
        longest=most,
        packed_most=min(state.packed_most, max(0, most - sinks)),
    )
