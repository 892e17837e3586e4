"""Arithmetic steps of the definitions: float64 tensors that hold float32 numbers.

A sum, difference, product or quotient of two float32 numbers computed in float64 and rounded to float32 is the float32
operation (53 >= 2*24 + 2 bits: the second rounding does no harm), so `f32` after every operation is float32 arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvdsl.scheme import MetaFormat, Rounding

FORMATS: dict[MetaFormat, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LARGEST_INPUT = 65504.0


def f32(x: Tensor) -> Tensor:
    """The nearest float32 numbers (ties to even), as float64."""
    return x.to(torch.float32).to(torch.float64)


def constant(value: float) -> float:
    """A Python number as float32 arithmetic sees it."""
    return float(torch.tensor(value, dtype=torch.float64).to(torch.float32))


def stored(x: Tensor, dtype: MetaFormat) -> Tensor:
    """float64 `x` (holding float32 numbers) as the metadata format keeps it: saturated, rounded, zero without sign.

    The sign of a zero is dropped because min and max of +0 and -0 may be either.
    """
    largest = torch.finfo(FORMATS[dtype]).max
    return x.clamp(-largest, largest).to(FORMATS[dtype]).to(torch.float64) + 0.0


def to_integer(y: Tensor, rounding: Rounding) -> Tensor:
    """Nearest with ties to even, nearest with ties up, or the integer below."""
    if rounding == "floor":
        return torch.floor(y)
    nearest = torch.round(y)
    if rounding == "half_up":
        return torch.where(y - nearest == 0.5, nearest + 1, nearest)
    return nearest


def ratio(x: Tensor, scale: Tensor) -> Tensor:
    """float32 `x / scale`, and 0 where the scale is 0 (a range of zero, or one below the format's smallest number)."""
    return torch.where(scale == 0, torch.zeros_like(x), f32(x / torch.where(scale == 0, torch.ones_like(scale), scale)))


def bits_of(x: Tensor) -> Tensor:
    """The bit patterns (int64, 0..2**32-1) of float64 tensors that hold float32 numbers."""
    return x.to(torch.float32).view(torch.int32).to(torch.int64) & 0xFFFFFFFF


def from_bits(word: Tensor) -> Tensor:
    """The float32 numbers with the bit patterns `word` (int64 below 2**31), as float64."""
    return word.to(torch.int32).view(torch.float32).to(torch.float64)
