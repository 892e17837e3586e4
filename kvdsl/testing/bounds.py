"""How far a decoded number may lie from its original: a bound derived from the definitions, for every scheme.

Let a block have numbers of size at most A, L levels, the exact step s and the exact offset o; `store` rounds them to
the metadata format, moving v by at most dev(v) = max(u*|v|, e) + max(0, |v| - largest): u is half the spacing of the
format's numbers relative to them, e half its smallest number.

- Inside the range of the stored levels a number is off by at most f*s', s' <= s + dev(s) being the stored step: f = 1/2
  for nearest and for cells, 1 for floor.  (P1, P2)
- The stored levels may end short of the range: by at most L*dev(s) + dev(o), since L - 1 steps (L cells) lie between
  the ends.
- With an integer zero point z, the levels are moved by up to half a step, and x/s and z are rounded one by one, so f
  is larger by 1/2; z itself is stored with dev(z) <= dev(|o|/s + 1/2), which is s'*dev(z) in x.  Where a step above 0
  is stored as 0, z has no meaning and everything decodes to 0: the bound is A.
- signed_absmax has L/2 - 1 levels on the far side: a number there is off by up to one step, f = 1.
- A clip below 1 cuts (1 - clip)*A off each end.
- in_scale rounds the step to a multiple of 2^bits in its last place: u = 2^(bits - 24).
- Float32 arithmetic: seven roundings of numbers up to A + s, each 2^-24 of it.  (c*s'+o, x - o, the quotient, hi - lo)

A calibrated scale has its levels given: f*s inside them, plus the distance to the nearest of them outside.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvdsl.kernels import Params
from kvdsl.reference.quantize import encoded_rows, level_count, maps
from kvdsl.scheme import Float, Scale, Store, Uniform

FORMATS = {
    "fp16": (2.0**-11, 2.0**-25, 65504.0),
    "bf16": (2.0**-8, 2.0**-134, 3.3895e38),
    "fp32": (2.0**-24, 2.0**-150, 3.4028e38),
}
LARGEST = 65504.0


def deviation(value: Tensor, dtype: str, spare: int = 0) -> Tensor:
    """dev(value): how far storing moves it; `spare` last bits of the number are not its own."""
    unit, least, largest = FORMATS[dtype]
    factor = 1 << spare
    return (value.abs() * unit * factor).clamp(min=least * factor) + (value.abs() - largest).clamp(min=0)


def blocks_of(store: Store, x: Tensor) -> Tensor:
    """x (B, H, T, D) as (B, H/bh, bh, T/bt, bt, D/bc, bc)."""
    assert store.measure is not None
    batch, heads, tokens, channels = x.shape
    block = store.measure.block
    bh, bt, bc = (
        size if isinstance(size, int) else length
        for size, length in zip((block.heads, block.tokens, block.channels), (heads, tokens, channels), strict=True)
    )
    return x.reshape(batch, heads // bh, bh, tokens // bt, bt, channels // bc, bc)


def spread(store: Store, number: Tensor, x: Tensor) -> Tensor:
    """A number of every block (B, H/bh, T/bt, D/bc), or a calibrated one of (1, H/bh, 1, D/bc), at each place of x."""
    blocks = blocks_of(store, x)
    return number[:, :, None, :, None, :, None].expand(blocks.shape).reshape(x.shape)


def bound(store: Store, x: Tensor, params: Params | None = None, side: str = "keys") -> Tensor:
    """The largest legal |x - x^|, float64 (B, H, T, D), for finite x (B, H, T, D) of whole blocks."""
    if store.turned:
        return _mapped_bound(store, x, params, side)
    given = x.double()
    inside = given.clamp(-LARGEST, LARGEST)
    if isinstance(store.code, Float):
        if store.code.format == "fp32":
            return torch.zeros_like(given)
        return deviation(inside, "fp16") + (given - inside).abs()
    assert isinstance(store.code, Uniform) and store.measure is not None
    numbers = blocks_of(store, inside)
    if store.measure.when == "calibrated":
        assert params is not None
        limit = _calibrated(
            store.code, store.measure, numbers, params[f"{side}.scale"].double().cpu(), level_count(store)
        )
    else:
        limit = _online(store.code, store.measure, numbers, level_count(store)).expand_as(numbers)
    return limit.reshape(x.shape) + (given - inside).abs()


def _mapped_bound(store: Store, x: Tensor, params: Params | None, side: str) -> Tensor:
    """The bound of y = E x - u carried back by |W|, and what rounding of the maps and of two sums adds: W E is the
    identity but for 2^-24 of each factor, of which there are D in a sum."""
    found = maps(store, x.shape[3], x.shape[1], params, side)
    assert found is not None
    encode, _, decode, shift = (part.abs() for part in found)
    coded = encoded_rows(store, x, params, side)
    within = bound(store.with_(transform=()), coded, params, side) @ decode.mT
    size = x.double().abs().clamp(max=LARGEST) @ encode.mT @ decode.mT + shift[:, None]
    return within + 2.0**-22 * size + (x.double().abs() - LARGEST).clamp(min=0)


def _factor(code: Uniform, scale: Scale) -> float:
    if scale.range == "signed_absmax":
        return 1.0
    rounded = 1.0 if code.rounding == "floor" and code.grid == "ends" else 0.5
    return rounded + (0.5 if scale.zero != "min" else 0.0)


def _online(code: Uniform, scale: Scale, numbers: Tensor, levels: int) -> Tensor:
    axes = (2, 4, 6)
    largest = numbers.abs().amax(axes, keepdim=True)
    low, high = scale.clip * numbers.amin(axes, keepdim=True), scale.clip * numbers.amax(axes, keepdim=True)
    if scale.range == "minmax_zero" or scale.zero == "in_scale":
        low, high = low.clamp(max=0), high.clamp(min=0)
    symmetric = scale.range in ("absmax", "signed_absmax")
    if scale.range == "absmax":
        step = scale.clip * largest * (2 / levels if code.grid == "cells" else 1 / ((levels - 1) // 2))
    elif scale.range == "signed_absmax":
        step = scale.clip * largest / (levels // 2)
    else:
        step = (high - low) / (levels if code.grid == "cells" else levels - 1)

    spare = (code.bits or 0) if scale.zero == "in_scale" else 0
    moved = deviation(step, scale.dtype, spare)
    limit = _factor(code, scale) * (step + moved) + levels * moved + (1 - scale.clip) * largest
    if not symmetric and scale.zero == "min":
        limit = limit + deviation(low, scale.dtype)
    elif not symmetric and scale.zero == "point":
        least = (step - moved).clamp(min=0)
        point = low.abs() / torch.where(least == 0, torch.ones_like(least), least) + 0.5
        limit = limit + levels * moved + (step + moved) * deviation(point, scale.dtype)
        limit = torch.where(least == 0, limit + largest, limit)
        limit = torch.where(step == 0, deviation(low, scale.dtype) + (1 - scale.clip) * largest, limit)
    elif not symmetric:
        limit = limit + levels * moved
    return limit + 7 * 2.0**-24 * (largest + step)


def _calibrated(code: Uniform, scale: Scale, numbers: Tensor, given: Tensor, levels: int) -> Tensor:
    ranged = scale.range in ("minmax", "minmax_zero")
    step = (given[0] if ranged else given)[None, :, None, None, None, :, None]
    half = 0.5 if code.grid == "cells" else 0.0
    if ranged:
        bottom = given[1][None, :, None, None, None, :, None] + step * half
    else:
        shift = levels // 2 if scale.range == "signed_absmax" or code.grid == "cells" else (levels - 1) // 2
        bottom = step * (half - shift)
    top = bottom + step * (levels - 1)
    outside = torch.maximum(numbers - top, bottom - numbers).clamp(min=0)
    floor = code.rounding == "floor" and code.grid == "ends"
    slack = 7 * 2.0**-24 * (numbers.abs() + top.abs() + bottom.abs())
    return torch.maximum((1.0 if floor else 0.5) * step.expand_as(numbers), outside) + slack
