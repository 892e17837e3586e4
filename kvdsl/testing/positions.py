"""A law of keys stored before rotary positions: taken off and put back, positions change nothing."""

from __future__ import annotations

from dataclasses import replace

import torch

from kvdsl.reference.quantize import maps
from kvdsl.reference.spaces import applied
from kvdsl.scheme import ALL, Eigenbasis, Float, Scheme, Store

from .cases import Case, law, require_within
from .data import MODEST
from .driving import Ends, device_of, packed, ready
from .products import query_sizes


def _has_positions(scheme: Scheme) -> bool:
    return scheme.keys.rope is not None


@law("P19", _has_positions, MODEST)
def positions_come_back(case: Case) -> None:
    """P19: keys that are stored exactly once their positions are off give the scores of the keys themselves, at any
    position: within (D + 16) 2^-24 of the products' sizes, for sums of D terms and the roundings of both rotations.
    Where maps are behind them, three times that, of the sizes that they make; of a basis all numbers are kept."""
    parts = case.scheme.keys.transform
    whole = tuple(part.with_(rank=ALL) if isinstance(part, Eigenbasis) else part for part in parts)  # type: ignore
    exact = Store(Float("fp32"), transform=whole)
    case = replace(case, scheme=case.scheme.with_(keys=exact))
    k, v = case.pair(case.tokens)
    params = case.params(k, v)
    lead = torch.zeros(*k.shape[:2], case.sinks, k.shape[3], dtype=k.dtype)
    ends: Ends = {"keys": [case.tokens] * case.batch, "values": [0] * case.batch}
    pages = packed(case.kernels, torch.cat([lead, k], 2), torch.cat([lead, v], 2), ends, params)
    q, device = case.query(2), device_of(case.kernels)
    there = ready(case.kernels, params)
    got = case.kernels.scores(q.to(device), pages.pool, pages.table, case.tokens, there).cpu()
    group = case.shape.group
    want = q.double() @ k.double().repeat_interleave(group, 1).transpose(2, 3)
    sizes, _ = query_sizes(exact, q, case.shape.kv_heads, params).chunk(2, -1)
    lengths, _ = query_sizes(exact, k, case.shape.kv_heads, params).chunk(2, -1)
    found, sums = maps(exact, case.shape.head_dim, case.shape.kv_heads, params, "keys"), 1
    if found is not None:
        encode, moved, decode, shift = (part.abs() for part in found)
        there_and_back = applied(decode, applied(encode, lengths) + moved[:, None]) + shift[:, None]
        lengths, _ = query_sizes(exact, there_and_back, case.shape.kv_heads, params).chunk(2, -1)
        sums = 3
    limit = sizes @ lengths.repeat_interleave(group, 1).transpose(2, 3) * sums * (case.shape.head_dim + 16) * 2.0**-24
    require_within("scores", got, want, limit + 1e-30)
