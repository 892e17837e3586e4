"""Round trips of a case: its tokens packed by its kernels, behind poisoned sinks, and decoded again."""

from __future__ import annotations

import torch
from torch import Tensor

from kvdsl.kernels import Params
from kvdsl.scheme import SIDES, Bands, Float, Scheme, Shared, Store

from .cases import Case
from .driving import USUAL, Ends, Pages, Poison, packed, ready


def with_sinks(case: Case, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Poisoned sinks before the tokens that are packed: they may not count."""
    keys, values = (torch.cat([x.new_full((*x.shape[:2], case.sinks, x.shape[3]), torch.nan), x], 2) for x in (k, v))
    return keys, values


def pages_of(case: Case, k: Tensor, v: Tensor, params: Params, poison: Poison = USUAL) -> Pages:
    """All tokens of k and v packed."""
    ends: Ends = {side: [k.shape[2]] * case.batch for side in SIDES}
    return packed(case.kernels, *with_sinks(case, k, v), ends, params, poison)


def decoded(case: Case, pages: Pages, begin: int, end: int, params: Params) -> tuple[Tensor, Tensor]:
    """What the kernels decode of tokens [begin, end), float32 (B, H, T, D) a side."""
    there = ready(case.kernels, params)
    keys, values = (case.kernels.unpack(side, pages.pool, pages.table, begin, end, there).cpu() for side in SIDES)
    return keys, values


def roundtrip(case: Case, k: Tensor, v: Tensor, params: Params) -> tuple[Tensor, Tensor]:
    """All tokens of k and v packed and decoded."""
    return decoded(case, pages_of(case, k, v, params), 0, k.shape[2], params)


def plain(store: Store) -> bool:
    """The numbers themselves are stored."""
    return isinstance(store.code, Float) and store.code.plain


def bare(scheme: Scheme) -> bool:
    """Whether vectors are coded as they are on both sides, each by one code."""
    whole = not any(isinstance(store.code, (Bands, Shared)) for store in (scheme.keys, scheme.values))
    return whole and not (scheme.keys.turned or scheme.values.turned)
