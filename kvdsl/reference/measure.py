"""How a block is measured: its scale and offset, as they are stored and as they are used after."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvdsl.codes import Uniform
from kvdsl.scheme import Code, Scale

from .alphabets import Alphabet, has_offset
from .rounding import (
    HIGHEST_POWER,
    LOWEST_POWER,
    bits_of,
    constant,
    exponent,
    f32,
    from_bits,
    ratio,
    stored,
    sum64,
    to_integer,
)


@dataclass(frozen=True)
class Measured:
    """Of every block (...): the scale and the offset as stored, and as coding and decoding use them.

    They differ by the second level S: s is stored as s/S and used as that times S, float32 each.
    """

    scale: Tensor
    offset: Tensor | None
    s: Tensor
    o: Tensor | None


def measure(x: Tensor, code: Code, scale: Scale, clip: float, letters: Alphabet, second: Tensor | None) -> Measured:
    """Blocks x (..., numbers) measured under one clip; `second` is the second level, broadcast over blocks."""
    factor = constant(clip)
    if scale.quantile is not None:
        bound = x.abs().sort(-1).values[..., scale.bounding(x.shape[-1]), None]
        x = torch.maximum(torch.minimum(x, bound), -bound)
    if scale.dtype == "e8m0":
        return _power_of_two(f32(factor * x.abs().amax(-1)), letters.top, scale, second)
    if scale.range == "norm":
        mean = f32(sum64(x * x) / x.shape[-1])
        return kept(f32(factor * f32(mean.sqrt())), None, scale, second)
    if scale.range == "absmean":
        return kept(f32(factor * f32(sum64(x.abs()) / x.shape[-1])), None, scale, second)
    if scale.range == "absmax":
        size = f32(factor * x.abs().amax(-1))
        if isinstance(code, Uniform) and code.grid == "cells":
            return kept(f32(2 * size / letters.count), None, scale, second)
        return kept(f32(size / letters.top), None, scale, second)
    if scale.range == "signed_absmax":
        high, low = x.amax(-1), x.amin(-1)
        extreme = f32(factor * torch.where(high >= -low, high, low))
        return kept(f32(extreme / letters.lowest), None, scale, second)

    low, high = f32(factor * x.amin(-1)), f32(factor * x.amax(-1))
    if scale.range == "minmax_zero" or scale.zero == "in_scale":
        low, high = low.clamp(max=0), high.clamp(min=0)
    if not isinstance(code, Uniform):  # levels of about -1..1 stand around the middle, as far as half the width
        return kept(f32(f32(high - low) / 2), f32(f32(high + low) / 2), scale, second)
    intervals = letters.count if code.grid == "cells" else letters.count - 1
    step = f32(f32(high - low) / intervals)
    if scale.zero == "min":
        return kept(step, low, scale, second)
    if scale.zero_inside:
        unit = 1 << (2 if code.bits is None else code.bits)  # of three levels stored five in a byte: what one needs
        s = from_bits((bits_of(step) + unit // 2) & ~(unit - 1))
        point = to_integer(ratio(-low, s), "even").clamp(0, letters.count - 1) + 0.0
        return Measured(s, point, s, point)
    # A constant block is one step away from zero, so that it decodes to its constant.
    found = kept(torch.where(step == 0, low.abs(), step), None, scale, second)
    point = torch.where(step == 0, (low < 0).to(low), to_integer(ratio(-low, found.s), "even"))
    if scale.range == "minmax_zero":
        point = point.clamp(0, letters.count - 1)
    point = stored(point, scale.dtype)
    return replace(found, offset=point, o=point)


def kept(s: Tensor, o: Tensor | None, scale: Scale, second: Tensor | None) -> Measured:
    """A scale and an offset as they are stored and used."""
    found = [n if n is None or second is None else f32(n / second) for n in (s, o)]
    if scale.floor and found[0] is not None:
        found[0] = found[0].clamp(min=constant(scale.floor))
    words = [None if n is None else stored(n, scale.dtype) for n in found]
    used = [word if word is None or second is None else f32(word * second) for word in words]
    assert words[0] is not None and used[0] is not None
    return Measured(words[0], words[1], used[0], used[1])


def refitted(x: Tensor, levels: Tensor, found: Measured, scale: Scale, second: Tensor | None) -> Measured:
    """The second scale, for codes that stand for `levels` (..., numbers); the first one where it would be over 0."""
    if scale.refit == "norm":
        above, below = f32(sum64(x * x).sqrt()), f32(sum64(levels * levels).sqrt())
    elif scale.refit == "unit_gain":
        above, below = sum64(x * x), sum64(x * levels)
    else:
        weight = x * x if scale.refit == "weighted_least_squares" else torch.ones_like(x)
        above, below = sum64(weight * x * levels), sum64(weight * levels * levels)
    new = kept(ratio(above, below), None, scale, second)
    return Measured(
        torch.where(below == 0, found.scale, new.scale), None, torch.where(below == 0, found.s, new.s), None
    )


def _power_of_two(size: Tensor, top: float, scale: Scale, second: Tensor | None) -> Measured:
    """The power of two by the scale's rule, the smallest one for a block of zeros."""
    size = size if second is None else f32(size / second)
    if scale.exponent == "floor":  # OCP MX: 2^(floor(log2 max|x|) - floor(log2 top))
        power = exponent(size) - exponent(torch.tensor(top, dtype=torch.float64))
    else:
        size = f32(size / top)
        power = exponent(size)
        above = size / torch.exp2(power)  # 1 to 2
        power = power + (above > 1 if scale.exponent == "ceil" else above * above >= 2)
    power = torch.where(size == 0, torch.full_like(power, LOWEST_POWER), power.clamp(LOWEST_POWER, HIGHEST_POWER))
    word = torch.exp2(power)
    return Measured(word, None, word if second is None else f32(word * second), None)


def shifted(found: Measured, scale: Scale) -> tuple[Tensor | float, Tensor]:
    """(what is taken off a number before it is divided, the zero point of its code), (..., 1) each where not 0."""
    none = torch.zeros((), dtype=torch.float64)
    if found.o is None or not has_offset(scale):
        return 0.0, none
    return (found.o[..., None], none) if scale.zero == "min" else (0.0, found.o[..., None])
