"""What the kernels' products are of: codes times scales in the space that is coded, exact numbers as they are.

A mapped side is two vectors side by side, (M numbers of the code, D exact channels), one of them zero; a query is
mapped to match: (W^T q, q).  So a score is the product of both, whatever a side's space is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvdsl.kernels import Params
from kvdsl.levels import table
from kvdsl.reference.quantize import Quantized, encoded_rows, maps, quantize
from kvdsl.reference.timeline import contents
from kvdsl.scheme import Codebook, Side, Store, Uniform

from .bounds import second, spread

Largest = Callable[[Store, Tensor, Params], Tensor]


def sides_of(store: Store, x: Tensor, span: tuple[int, int], params: Params, side: Side) -> tuple[Tensor, Tensor]:
    """What a cache holds of x (1, H, T, D) with tokens `span` packed, float64 (1, H, T, D), and the factors of products
    with it (1, H, T, D or M + D): code times scale, without what is added beside it, and exact numbers."""
    first, end = span
    whole = contents(store, x, span, params, side)
    exact = whole.clone()
    part = x.new_zeros(*x.shape[:3], store.coded(x.shape[3]), dtype=torch.float64)
    if end > first:
        numbers = quantize(store, x[:, :, first:end], params, side)
        factors = _factors(store, numbers, params, side)
        part[:, :, first:end] = factors
        exact[:, :, first:end] = 0 if store.turned else factors
    return whole, torch.cat((part, exact), -1) if store.turned else exact


def _factors(store: Store, numbers: Quantized, params: Params, side: Side) -> Tensor:
    """Code (or level) times scale: what remains of coded numbers without their offset.  Evenly spaced levels are codes,
    counted from the lowest."""
    if store.measure is None:
        return numbers.coded
    assert numbers.codes is not None and numbers.scale is not None
    outer = second(store, params, side)
    scale = spread(store, numbers.scale * outer, numbers.coded)
    if isinstance(store.code, Uniform):
        return numbers.codes * scale
    even = _step(store)
    if even is not None:
        return numbers.codes * scale * even
    if numbers.offset is None:
        return numbers.coded
    return numbers.coded - spread(store, numbers.offset * outer, numbers.coded)


def _step(store: Store) -> float | None:
    """The step of evenly spaced levels of a table."""
    levels = store.code.levels if isinstance(store.code, Codebook) else ()
    if isinstance(levels, str):
        return 2 * table(store.code, 128)[1] if levels != "calibrated" and store.code.bits == 1 else None  # type: ignore
    steps = {high - low for low, high in zip(levels, levels[1:], strict=False)}
    return steps.pop() if len(steps) == 1 else None


def sizes_of(store: Store, x: Tensor, span: tuple[int, int], params: Params, side: Side, largest: Largest) -> Tensor:
    """The largest size in the block of each factor of `sides_of`."""
    first, end = span
    x = x.double()
    exact = torch.maximum(x.abs(), contents(store, x, span, params, side).abs())
    part = x.new_zeros(*x.shape[:3], store.coded(x.shape[3]))
    if end > first:
        rows = x[:, :, first:end]
        coded = encoded_rows(store, rows, params, side).double()
        size = torch.maximum(largest(store, coded, params), quantize(store, rows, params, side).coded.abs())
        part[:, :, first:end] = size
        exact[:, :, first:end] = 0 if store.turned else size
    return torch.cat((part, exact), -1) if store.turned else exact


def mapped_query(store: Store, q: Tensor, heads: int, params: Params) -> Tensor:
    """What multiplies the factors of keys: q (B, Hq, Q, D), or with W^T q before it."""
    found = maps(store, q.shape[3], heads, params, "keys")
    if found is None:
        return q.double()
    decode = found[2].expand(heads, -1, -1).repeat_interleave(q.shape[1] // heads, 0)
    return torch.cat((q.double() @ decode, q.double()), -1)


def mapped_back(store: Store, part: Tensor, head_dim: int, params: Params) -> Tensor:
    """The factors of values as parts of the output's channels: (1, H, T, D)."""
    found = maps(store, head_dim, part.shape[1], params, "values")
    if found is None:
        return part
    numbers = part.shape[3] - head_dim
    return part[..., :numbers] @ found[2].mT + part[..., numbers:]
