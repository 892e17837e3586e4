"""The alphabets: which code a number over its scale gets, and which number a code stands for.

The middle of a uniform code is code (levels - 1)//2, or levels//2 where the lowest level is farther from 0 than the
highest.  Under a minimum the lowest level is code 0; under an integer zero point z the number 0 is code z.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvdsl.codes import Additive, Codebook, Float, Sketch, Uniform, Vectors
from kvdsl.errors import ShapeError
from kvdsl.levels import table
from kvdsl.matrices import estimator
from kvdsl.scheme import Scale, Store

from .rounding import MINIFLOATS, f32, minifloat_bits, minifloat_values, nearest, to_integer
from .spaces import Params


@dataclass(frozen=True)
class Alphabet:
    """A code's letters.  Numbers and codes are float64 tensors; z is the integer zero point, 0 where there is none.

    encode   (x/s, z) -> code
    level    (code, z) -> the number it stands for, times s
    lowest   the level of the code that `signed_absmax` puts the extreme on
    top      the largest level, on which `absmax` puts the largest number (None: a uniform code's range has its own)
    count    how many levels there are, of a uniform code
    compared the levels of a table that numbers are compared with; None where there is no table
    """

    encode: Callable[[Tensor, Tensor], Tensor]
    level: Callable[[Tensor, Tensor], Tensor]
    lowest: float
    top: float
    count: int = 0
    compared: Tensor | None = None


def alphabet(store: Store, channels: int, given: Tensor | None) -> Alphabet:
    """The letters of a store whose block has `channels` channels (a sketch: whose vectors have), `given` its table."""
    code = store.code
    if isinstance(code, Uniform):
        assert store.measure is not None
        return _uniform(code, store.measure, level_count(store))
    if isinstance(code, Float):
        return _float(code)
    if isinstance(code, Sketch):
        a = float(f32(torch.tensor(estimator(code, channels), dtype=torch.float64)))
        return _table(torch.tensor([-a, a], dtype=torch.float64))
    assert isinstance(code, Codebook)
    if given is not None:
        return _table(*given)
    return _table(f32(torch.tensor(table(code, channels), dtype=torch.float64)))


def level_count(store: Store) -> int:
    """How many levels the store's uniform code has: one fewer than 2**bits where `absmax` needs an even grid."""
    assert isinstance(store.code, Uniform) and store.measure is not None
    if store.code.levels is not None:
        return store.code.levels
    assert store.code.bits is not None
    centred = store.measure.range == "absmax" and store.code.grid == "ends"
    return (1 << store.code.bits) - (1 if centred else 0)


def code_bits(store: Store) -> int:
    """Bits of one code on its own; of an fp16 or fp32 number those of the number."""
    code = store.code
    if isinstance(code, Float):
        return MINIFLOATS[code.format].bits if code.format in MINIFLOATS else int(code.format[2:])
    if isinstance(code, Sketch):
        return 1
    if isinstance(code, Additive):
        return 8  # a byte of a row of them
    if isinstance(code, Uniform) and code.bits is None:
        assert code.levels is not None
        return math.ceil(math.log2(code.levels))
    assert isinstance(code, (Uniform, Codebook, Vectors))
    if code.bits is None:
        assert isinstance(code, Codebook) and isinstance(code.levels, tuple)
        return max(1, math.ceil(math.log2(len(code.levels))))
    return code.bits


def holds_numbers(store: Store) -> bool:
    """Whether the store keeps rows of fp16 or fp32 numbers, and no codes."""
    return isinstance(store.code, Float) and store.code.format in ("fp16", "fp32")


def given_table(store: Store, params: Params | None, side: str) -> Tensor | None:
    """The levels of a `calibrated` codebook, float32 numbers (2, levels): those that numbers are compared with, and
    those that codes are decoded at, the same where they match nothing; None for every other code."""
    if not isinstance(store.code, Codebook) or store.code.levels != "calibrated":
        return None
    name = f"{side}.code"
    levels = None if params is None else params.get(name)
    if levels is None:
        raise ShapeError(f"params[{name!r}]: missing; the levels of the {side} are calibrated, give their numbers")
    assert store.code.bits is not None
    right = (1 << store.code.bits,) if store.code.match is None else (2, 1 << store.code.bits)
    if tuple(levels.shape) != right:
        raise ShapeError(f"params[{name!r}]: shape {tuple(levels.shape)}; the right one is {right}")
    return f32(levels.detach().cpu()).expand(2, -1)


def _uniform(code: Uniform, scale: Scale, count: int) -> Alphabet:
    rounding = "floor" if code.grid == "cells" else code.rounding
    half = 0.5 if code.grid == "cells" else 0.0
    if has_offset(scale):
        middle = 0
    else:
        middle = count // 2 if scale.range == "signed_absmax" or code.grid == "cells" else (count - 1) // 2

    def encode(y: Tensor, z: Tensor) -> Tensor:
        return f32(to_integer(y, rounding) + (middle + z)).clamp(0, count - 1)

    def level(c: Tensor, z: Tensor) -> Tensor:
        return f32(c - (middle + z) + half)

    top = count / 2 if code.grid == "cells" else (count - 1) // 2
    return Alphabet(encode, level, -(count // 2), top, count)


def _table(levels: Tensor, decoded: Tensor | None = None) -> Alphabet:
    """The nearest level, the lower one of two equally near; borders are the float32 numbers next to the middles.  Codes
    stand for `decoded` levels where these are others."""
    borders = f32((levels[1:] + levels[:-1]) / 2)

    def encode(y: Tensor, z: Tensor) -> Tensor:
        return (y[..., None] > borders).sum(-1).to(torch.float64)

    every = levels if decoded is None else decoded
    return Alphabet(
        encode, lambda c, z: every[c.to(torch.int64)], float(levels[0]), float(levels.abs().max()), len(levels), levels
    )


def _float(code: Float) -> Alphabet:
    kind = MINIFLOATS[code.format]
    values = minifloat_values(kind)

    def encode(y: Tensor, z: Tensor) -> Tensor:
        return minifloat_bits(nearest(y, kind, code.rounding), kind).to(torch.float64)

    return Alphabet(encode, lambda c, z: values[c.to(torch.int64)], -kind.top, kind.top, len(values))


def has_offset(scale: Scale) -> bool:
    """Whether a range stores a second number beside the scale."""
    return scale.range in ("minmax", "minmax_zero")
