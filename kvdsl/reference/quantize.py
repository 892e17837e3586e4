"""One store applied to one tensor.

Every block of `tokens` x `channels` x `heads` numbers is measured, its scale (and offset) stored in the metadata
format, and its numbers coded with what was stored.  Blocks are counted from the first token given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvdsl.errors import ShapeError
from kvdsl.scheme import Count, Float, Scale, Store, Uniform

from .rounding import LARGEST_INPUT, bits_of, constant, f32, from_bits, ratio, stored, to_integer

Params = Mapping[str, Tensor]


@dataclass(frozen=True)
class Quantized:
    """What a store keeps of a tensor (B, H, T, D), as float64 and int64.

    codes    int64 (B, H, T, D), 0..levels-1; None under a Float code
    scale    float64 (B, H / heads, T / tokens, D / channels), one number a block, exactly as stored: NaN where the
             block held a NaN; (1, H / heads, 1, D / channels) if calibrated; None under a Float code
    offset   as scale: the minimum, or the integer zero point; None where the range has none
    decoded  float64 (B, H, T, D), every number a float32 number
    """

    codes: Tensor | None
    scale: Tensor | None
    offset: Tensor | None
    decoded: Tensor


def quantize(store: Store, x: Tensor, params: Params | None = None, side: str = "keys") -> Quantized:
    """Codes, stored metadata and decoded numbers of every number of `x` (B, H, T, D), whole blocks.

    `params` holds `<side>.scale` of a calibrated scale.  Raises ShapeError for a tensor that is no whole number of
    blocks and for params that are missing or of another shape.
    """
    x = widened(x, side)
    if isinstance(store.code, Float):
        return Quantized(None, None, None, _float(x, store.code))
    assert isinstance(store.code, Uniform) and store.measure is not None
    code, scale = store.code, store.measure
    levels = level_count(store)
    size = block_size(scale, x.shape, side)

    numbers = _cut(x, size)
    invalid = numbers.isnan().any(-1)
    numbers = torch.where(numbers.isnan(), torch.zeros_like(numbers), numbers).clamp(-LARGEST_INPUT, LARGEST_INPUT)
    if scale.when == "calibrated":
        s, o = _given(store, x.shape, size, params, side)
        final = s
    else:
        s, o = _measure(numbers, code, scale, levels)
        final = torch.where(invalid, torch.full_like(s, float("nan")), s)
    c = _encode(numbers, s[..., None], None if o is None else o[..., None], code, scale, levels)
    decoded = _decode(c, final[..., None], None if o is None else o[..., None], code, scale, levels)
    return Quantized(_join(c, x.shape, size).to(torch.int64), final, o, _join(decoded, x.shape, size))


def widened(x: Tensor, name: str) -> Tensor:
    """`x` as float64 holding float32 numbers; float64 input is rounded to float32 first."""
    if x.dim() != 4:
        raise ShapeError(f"{name}: shape {tuple(x.shape)} has {x.dim()} axes; give (batch, heads, tokens, head_dim)")
    if not x.is_floating_point():
        raise ShapeError(f"{name}: dtype {x.dtype} is no float; give float16, bfloat16 or float32")
    return f32(x.detach().cpu())


def level_count(store: Store) -> int:
    """How many levels the store's uniform code has: one fewer than 2**bits where `absmax` needs an even grid."""
    assert isinstance(store.code, Uniform) and store.measure is not None
    if store.code.levels is not None:
        return store.code.levels
    assert store.code.bits is not None
    centred = store.measure.range == "absmax" and store.code.grid == "ends"
    return (1 << store.code.bits) - (1 if centred else 0)


def block_size(scale: Scale, shape: torch.Size | tuple[int, ...], side: str) -> tuple[int, int, int]:
    """(heads, tokens, channels) of a block of a tensor of `shape`; ShapeError where blocks do not fill an axis."""
    _, heads, tokens, channels = shape
    block = scale.block
    size = (_count(block.heads, heads), _count(block.tokens, tokens), _count(block.channels, channels))
    for axis, count, length in zip(("heads", "tokens", "channels"), size, (heads, tokens, channels), strict=True):
        if length % count:
            fact = f"{side}: shape {tuple(shape)} has {length} {axis}, no whole number of blocks of {count}"
            raise ShapeError(f"{fact}; give a multiple of {count}")
    return size


def _count(count: Count, length: int) -> int:
    return count if isinstance(count, int) else max(length, 1)


def _float(x: Tensor, code: Float) -> Tensor:
    if code.format == "fp32":
        return x
    return x.clamp(-LARGEST_INPUT, LARGEST_INPUT).to(torch.float16).to(torch.float64)


def _cut(x: Tensor, size: tuple[int, int, int]) -> Tensor:
    """(B, H, T, D) as (B, H / heads, T / tokens, D / channels, numbers of a block)."""
    (b, h, t, d), (bh, bt, bc) = x.shape, size
    x = x.reshape(b, h // bh, bh, t // bt, bt, d // bc, bc)
    return x.permute(0, 1, 3, 5, 2, 4, 6).reshape(b, h // bh, t // bt, d // bc, bh * bt * bc)


def _join(blocks: Tensor, shape: torch.Size, size: tuple[int, int, int]) -> Tensor:
    """The inverse of `_cut`."""
    (b, h, t, d), (bh, bt, bc) = shape, size
    blocks = blocks.reshape(b, h // bh, t // bt, d // bc, bh, bt, bc)
    return blocks.permute(0, 1, 4, 2, 5, 3, 6).reshape(b, h, t, d)


def _measure(x: Tensor, code: Uniform, scale: Scale, levels: int) -> tuple[Tensor, Tensor | None]:
    """Stored scale and offset of every block: (..., numbers) -> two of (...)."""
    clip = constant(scale.clip)
    intervals = levels if code.grid == "cells" else levels - 1
    if scale.range == "absmax":
        size = f32(clip * x.abs().amax(-1))
        if code.grid == "cells":
            return stored(f32(2 * size / levels), scale.dtype), None
        return stored(f32(size / ((levels - 1) // 2)), scale.dtype), None
    if scale.range == "signed_absmax":
        high, low = x.amax(-1), x.amin(-1)
        extreme = f32(clip * torch.where(high >= -low, high, low))
        return stored(f32(extreme / -(levels // 2)), scale.dtype), None

    low, high = f32(clip * x.amin(-1)), f32(clip * x.amax(-1))
    if scale.range == "minmax_zero" or scale.zero == "in_scale":
        low, high = low.clamp(max=0), high.clamp(min=0)
    step = f32(f32(high - low) / intervals)
    if scale.zero == "min":
        return stored(step, scale.dtype), stored(low, scale.dtype)
    if scale.zero == "in_scale":
        assert code.bits is not None
        unit = 1 << code.bits
        s = from_bits((bits_of(step) + unit // 2) & ~(unit - 1))
        return s, to_integer(ratio(-low, s), "even").clamp(0, levels - 1) + 0.0
    # A constant block is one step away from zero, so that it decodes to its constant.
    s = stored(torch.where(step == 0, low.abs(), step), scale.dtype)
    point = torch.where(step == 0, (low < 0).to(low), to_integer(ratio(-low, s), "even"))
    if scale.range == "minmax_zero":
        point = point.clamp(0, levels - 1)
    return s, stored(point, scale.dtype)


def _encode(x: Tensor, s: Tensor, o: Tensor | None, code: Uniform, scale: Scale, levels: int) -> Tensor:
    """Codes of (..., numbers) under s and o of (..., 1)."""
    rounding = "floor" if code.grid == "cells" else code.rounding
    if o is None:
        shift = levels // 2 if _even(code, scale) else (levels - 1) // 2
        c = f32(to_integer(ratio(x, s), rounding) + shift)
    elif scale.zero == "min":
        c = to_integer(ratio(f32(x - o), s), rounding)
    else:
        c = f32(to_integer(ratio(x, s), rounding) + o)
    return c.clamp(0, levels - 1)


def _decode(c: Tensor, s: Tensor, o: Tensor | None, code: Uniform, scale: Scale, levels: int) -> Tensor:
    """Numbers of codes: s * (level of c) + minimum."""
    half = 0.5 if code.grid == "cells" else 0.0
    if o is None:
        shift = levels // 2 if _even(code, scale) else (levels - 1) // 2
        return f32(s * (c - shift + half))
    if scale.zero == "min":
        return f32(f32(s * (c + half)) + o)
    return f32(s * f32(c - o + half))


def _even(code: Uniform, scale: Scale) -> bool:
    """Whether code L/2 stands for the interval or level at 0 (else code (L-1)//2 does)."""
    return scale.range == "signed_absmax" or code.grid == "cells"


def _given(
    store: Store, shape: torch.Size, size: tuple[int, int, int], params: Params | None, side: str
) -> tuple[Tensor, Tensor | None]:
    """Scale and offset of a calibrated store, (1, H / heads, 1, D / channels) each."""
    assert store.measure is not None
    name = f"{side}.scale"
    if params is None or name not in params:
        raise ShapeError(f"params[{name!r}]: missing; the scale of the {side} is calibrated, give its numbers")
    blocks = (shape[1] // size[0], shape[3] // size[2])
    ranged = store.measure.range in ("minmax", "minmax_zero")
    right = (2, *blocks) if ranged else blocks
    given = params[name]
    if tuple(given.shape) != right:
        raise ShapeError(f"params[{name!r}]: shape {tuple(given.shape)}; the right one is {right}")
    numbers = f32(given.detach().cpu())
    if not ranged:
        return numbers[None, :, None, :], None
    return numbers[0][None, :, None, :], numbers[1][None, :, None, :]
