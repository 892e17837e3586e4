"""Arithmetic steps of the definitions: float64 tensors that hold float32 numbers.

A sum, difference, product or quotient of two float32 numbers computed in float64 and rounded to float32 is the float32
operation (53 >= 2*24 + 2 bits: the second rounding does no harm), so `f32` after every operation is float32 arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvdsl.codes import FloatRounding
from kvdsl.scheme import MetaFormat, Rounding

FORMATS: dict[MetaFormat, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LARGEST_INPUT = 65504.0
BIAS = 127  # of an e8m0 byte
LOWEST_POWER, HIGHEST_POWER = -126, 127


@dataclass(frozen=True)
class Minifloat:
    """A float of few bits: sign, exponent, `mantissa` bits; numbers below 2**lowest are subnormal, none above `top`."""

    bits: int
    mantissa: int
    lowest: int
    top: float
    nan: int | None


MINIFLOATS: dict[str, Minifloat] = {
    "e4m3": Minifloat(8, 3, -6, 448.0, 0x7F),
    "e5m2": Minifloat(8, 2, -14, 57344.0, 0x7E),
    "e2m1": Minifloat(4, 1, 0, 6.0, None),
}


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
    if dtype == "e8m0":
        return x  # a power of two, made by its own rule and held exactly
    if dtype in MINIFLOATS:
        return nearest(x, MINIFLOATS[dtype])
    largest = torch.finfo(FORMATS[dtype]).max
    return x.clamp(-largest, largest).to(FORMATS[dtype]).to(torch.float64) + 0.0


def exponent(x: Tensor) -> Tensor:
    """floor(log2 |x|), exactly; of 0 something finite."""
    return torch.frexp(x).exponent.to(torch.float64) - 1


def nearest(x: Tensor, kind: Minifloat, rounding: FloatRounding = "even") -> Tensor:
    """The nearest number of a minifloat, saturating, zero without sign; NaN stays."""
    x = x.clamp(-kind.top, kind.top)
    step = torch.exp2(exponent(x).clamp(min=kind.lowest) - kind.mantissa)
    y = x / step
    if rounding == "half_down":
        return torch.ceil(y - 0.5) * step + 0.0
    return to_integer(y, rounding) * step + 0.0


def minifloat_bits(x: Tensor, kind: Minifloat) -> Tensor:
    """The bit patterns (int64) of numbers that the minifloat holds exactly."""
    size = x.abs().nan_to_num(0.0)
    power = exponent(size).clamp(min=kind.lowest)
    normal = size >= 2.0**kind.lowest
    steps = (size / torch.exp2(power - kind.mantissa)).to(torch.int64)
    biased = torch.where(normal, power.to(torch.int64) - kind.lowest + 1, 0)
    bits = torch.where(normal, (biased << kind.mantissa) + steps - (1 << kind.mantissa), steps)
    bits = bits | ((x < 0).to(torch.int64) << (kind.bits - 1))
    return bits if kind.nan is None else torch.where(x.isnan(), kind.nan, bits)


def minifloat_values(kind: Minifloat) -> Tensor:
    """The number of every bit pattern; patterns that stand for no finite number are NaN."""
    pattern = torch.arange(1 << kind.bits)
    size = pattern & ((1 << (kind.bits - 1)) - 1)
    biased, steps = size >> kind.mantissa, size & ((1 << kind.mantissa) - 1)
    whole = torch.where(biased > 0, steps + (1 << kind.mantissa), steps).to(torch.float64)
    power = (biased.clamp(min=1) - 1 + kind.lowest - kind.mantissa).to(torch.float64)
    value = whole * torch.exp2(power)
    value = torch.where(value > kind.top, torch.full_like(value, float("nan")), value)
    return torch.where(pattern >> (kind.bits - 1) == 1, -value, value)


def to_integer(y: Tensor, rounding: Rounding) -> Tensor:
    """Nearest with ties to even, up, or away from zero; or the integer below."""
    if rounding == "floor":
        return torch.floor(y)
    closest = torch.round(y)
    if rounding == "half_up":
        return torch.where(y - closest == 0.5, closest + 1, closest)
    if rounding == "away":
        return torch.where((y - closest).abs() == 0.5, y + 0.5 * torch.sign(y), closest)
    return closest


def sum64(x: Tensor) -> Tensor:
    """The sum over a block's numbers, in float64 and rounded once."""
    return f32(x.sum(-1))


def ratio(x: Tensor, scale: Tensor) -> Tensor:
    """float32 `x / scale`, and 0 where the scale is 0 (a range of zero, or one below the format's smallest number)."""
    return torch.where(scale == 0, torch.zeros_like(x), f32(x / torch.where(scale == 0, torch.ones_like(scale), scale)))


def bits_of(x: Tensor) -> Tensor:
    """The bit patterns (int64, 0..2**32-1) of float64 tensors that hold float32 numbers."""
    return x.to(torch.float32).view(torch.int32).to(torch.int64) & 0xFFFFFFFF


def from_bits(word: Tensor) -> Tensor:
    """The float32 numbers with the bit patterns `word` (int64 below 2**31), as float64."""
    return word.to(torch.int32).view(torch.float32).to(torch.float64)
