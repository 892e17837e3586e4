"""Sums of vectors by their definition: the codes of every stage, what they stand for, their bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvdsl.codes import Additive
from kvdsl.scheme import Scale, Store

from .blocks import block_size, cut, join
from .measure import Measured, kept
from .rounding import constant, f32, ratio, sum64


def summed(y: Tensor, bad: Tensor, store: Store, table: Tensor, side: str) -> tuple[Tensor, Tensor, None, Tensor]:
    """Codes, scale and decoded numbers of finite y (B, H, T, D), NaN in blocks in which a number is `bad`."""
    assert isinstance(store.code, Additive) and store.measure is not None
    size = block_size(store.measure.block, y.shape, side)
    numbers, invalid = cut(y, size), cut(bad, size).any(-1)
    found = _norm(numbers, store.measure)
    vectors = entries(store.code, table, store)
    codes = encode(join(ratio(numbers, found.s[..., None]), y.shape, size), vectors)
    decoded = f32(cut(decode(codes, vectors), size) * found.s[..., None])
    nan = torch.full_like(decoded, float("nan"))
    scale = torch.where(invalid, nan[..., 0], found.scale)
    return codes, scale, None, join(torch.where(invalid[..., None], nan, decoded), y.shape, size)


def _norm(x: Tensor, scale: Scale) -> Measured:
    """The root of the mean square of every block, clipped and stored."""
    assert not isinstance(scale.clip, tuple)
    root = f32(f32(sum64(x * x) / x.shape[-1]).sqrt())
    return kept(f32(constant(scale.clip) * root), None, scale, None)


def entries(code: Additive, table: Tensor, store: Store) -> list[Tensor]:
    """The vectors (H, 2**bits, D) that each code chooses from, in the order of codes."""
    found = []
    for stage in table.to(torch.float16).to(torch.float64).unbind(1):
        found += [stage, quarter(stage, store)] if code.commuting else [stage]
    return found


def quarter(x: Tensor, store: Store) -> Tensor:
    """Every pair (a, b) of channels of x as (-b, a)."""
    d = x.shape[-1]
    neighbours = store.rope is not None and store.rope.interleaved
    out = torch.empty_like(x)
    for i in range(d // 2):
        a, b = (2 * i, 2 * i + 1) if neighbours else (i, i + d // 2)
        out[..., a], out[..., b] = -x[..., b], x[..., a]
    return out


def encode(y: Tensor, vectors: list[Tensor]) -> Tensor:
    """The codes of y (B, H, T, D): int64 (B, H, T, codes)."""
    left, codes = f32(y), []
    for table in vectors:
        least = torch.full(left.shape[:-1], float("inf"), dtype=torch.float64)
        code = torch.zeros_like(least, dtype=torch.int64)
        for entry in range(table.shape[1]):
            far = (f32(left - table[:, None, entry]) ** 2).sum(-1)
            code = torch.where(far < least, entry, code)
            least = torch.minimum(far, least)
        left = f32(left - _taken(table, code))
        codes.append(code)
    return torch.stack(codes, -1)


def decode(codes: Tensor, vectors: list[Tensor]) -> Tensor:
    """The sums that codes (B, H, T, codes) stand for, float64 (B, H, T, D)."""
    total = torch.zeros((), dtype=torch.float64)
    for table, code in zip(vectors, codes.unbind(-1), strict=True):
        total = f32(total + _taken(table, code))
    return total


def _taken(table: Tensor, code: Tensor) -> Tensor:
    return table[torch.arange(table.shape[0])[:, None], code]


def row_bytes(codes: Any, code: Additive) -> Any:
    """Codes (B, codes) as the bytes of a row (B, bytes), one behind the other from the lowest bit on."""
    size = -(-code.bits * codes.shape[1] // 8)
    row = [sum(int(c) << code.bits * i for i, c in enumerate(one)) for one in codes]
    return np.array([list(number.to_bytes(size, "little")) for number in row], dtype=np.int64)
