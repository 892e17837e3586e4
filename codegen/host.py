"""What every generated torch module shares: the pieces of device.py, under the same names, as vectorised torch.

Also how pages are taken apart: sections of bytes, the rows of words in them, the numbers stored beside codes.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

LARGEST = 65504.0


def finite(x: Tensor) -> Tensor:
    """NaN to 0, and everything into the range of float16."""
    return torch.nan_to_num(x, nan=0.0, posinf=LARGEST, neginf=-LARGEST).clamp(-LARGEST, LARGEST)


def saturated(x: Tensor) -> Tensor:
    """Numbers made finite, NaN kept."""
    return torch.where(x == x, finite(x), x)


def exact_quotient(dividend: Tensor, divisor: Tensor) -> Tensor:
    """dividend / divisor, rounded to nearest."""
    return dividend / divisor


def in_steps(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale, rounded to nearest; 0 where the scale is 0."""
    return (x / scale).masked_fill(scale == 0.0, 0.0)


in_half_steps = in_steps


def over(dividend: Tensor, divisor: float) -> Tensor:
    """dividend / divisor, rounded to nearest (torch would multiply by the inverse of a number)."""
    return dividend / _number(divisor, dividend.dtype, dividend.device)


@lru_cache(maxsize=256)
def _number(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number as a tensor of one, made once."""
    with torch.inference_mode(False):
        return torch.full((1,), value, dtype=dtype, device=device)


def nearest(x: Tensor) -> Tensor:
    """Round to the nearest integer, ties to even."""
    return torch.round(x)


def nearest_half_up(x: Tensor) -> Tensor:
    """Round to the nearest integer, ties up."""
    even = torch.round(x)
    return even + (x - even == 0.5).to(x.dtype)


def nearest_away(x: Tensor) -> Tensor:
    """Round to the nearest integer, ties away from zero."""
    whole = torch.trunc(x)
    return whole + torch.where((x - whole).abs() >= 0.5, torch.sign(x), 0.0)


def root(x: Tensor) -> Tensor:
    """The square root, rounded to nearest."""
    return torch.sqrt(x.to(torch.float64)).to(torch.float32)  # of float32 numbers torch does not round it to nearest


def wide(x: Tensor) -> Tensor:
    """As float64."""
    return x.to(torch.float64)


def narrow(x: Tensor) -> Tensor:
    """float64 rounded to float32."""
    return x.to(torch.float32)


def to_float(x: Tensor) -> Tensor:
    """Whole numbers as float32."""
    return x.to(torch.float32)


def as_int(x: Tensor) -> Tensor:
    """A float32's bits."""
    return x.contiguous().view(torch.int32)


def as_float(words: Tensor) -> Tensor:
    """32-bit words read as float32."""
    return words.contiguous().view(torch.float32)


def to_int(x: Tensor) -> Tensor:
    """Whole numbers as int32."""
    return x.to(torch.int32)


def to_int16(words: Tensor) -> Tensor:
    """The low 16 bits of 32-bit words."""
    return words.to(torch.int16)


def to_byte(words: Tensor) -> Tensor:
    """The low byte of 32-bit words."""
    return words.to(torch.uint8)


def small_float(x: Tensor, mantissa: int, least: int, top: float, sign: int, ties: int = 0) -> Tensor:
    """The bits of the nearest small float, saturating at `top`; a zero has no sign.

    Numbers from 2**least on have `mantissa` bits behind the first; smaller ones are spaced as those just above.  Ties
    go to even (0), away from zero (1), or down (2).
    """
    size = x.abs().clamp(max=top)
    exponent = (((as_int(size) >> 23) & 255) - 127).clamp(min=least)
    steps = size * as_float((127 + mantissa - exponent) << 23)
    if ties:
        whole = torch.floor(steps)
        beyond = (steps - whole > 0.5) | (steps - whole == 0.5) & ((x < 0.0) | (ties == 1))
        steps = whole + beyond.to(steps.dtype)
    else:
        steps = torch.round(steps)
    code = ((exponent - least) << mantissa) + steps.to(torch.int32)
    return torch.where((x < 0.0) & (code > 0), code + sign, code)


def bits_e4m3(x: Tensor) -> Tensor:
    """The nearest e4m3's bits, saturating.  A zero has no sign."""
    return small_float(x, 3, -6, 448.0, 128)


def power_of_two(size: Tensor, less: int, carried: int = 0) -> Tensor:
    """2**(floor(log2(size)) - less) within what 8 bits of exponent hold, twice that where `carried` carries."""
    exponent = torch.where(size < 2.0**-126, -126, (((as_int(size) + carried) >> 23) & 255) - 127 - less)
    return as_float((exponent.clamp(-126, 127) + 127) << 23)


def power_bits(scale: Tensor) -> Tensor:
    """The exponent's bits of a power of two."""
    return (as_int(scale) >> 23) & 255


def _bits(x: Tensor, dtype: torch.dtype, nan: int) -> Tensor:
    words = (x.to(dtype) + 0.0).view(torch.int16).to(torch.int32) & 0xFFFF
    return words.masked_fill_(x != x, nan)


def bits_fp16(x: Tensor) -> Tensor:
    """The nearest float16's bits, as int32; x within its range.  A zero has no sign."""
    return _bits(x, torch.float16, 0x7E00)


def bits_bf16(x: Tensor) -> Tensor:
    """The nearest bfloat16's bits, as int32.  A zero has no sign."""
    return _bits(x, torch.bfloat16, 0x7FC0)


def bits_fp32(x: Tensor) -> Tensor:
    """A float32's bits.  A zero has no sign."""
    return as_int(x + 0.0)


def halved(scale: Tensor, start: Tensor, spoilt: Tensor, dtype: torch.dtype, nan: int) -> Tensor:
    """Numbers that `dtype` holds as the low and the high 16 bits of words; a spoilt scale is NaN, whose bits these
    are."""
    words = torch.stack((scale, start), -1).to(dtype).view(torch.int16)
    words[..., 0].masked_fill_(spoilt, nan)
    return words.view(torch.int32).squeeze(-1)


def halves(words: Tensor) -> tuple[Tensor, ...]:
    """The low and the high 16 bits of 32-bit words, read as float16, as float32."""
    return words.contiguous()[..., None].view(torch.float16).to(torch.float32).unbind(-1)


def low_half(words: Tensor) -> Tensor:
    """The low 16 bits of each 32-bit word, read as float16, as float32."""
    return words.to(torch.int16).contiguous().view(torch.float16).to(torch.float32)


def high_half(words: Tensor) -> Tensor:
    """The high 16 bits of each 32-bit word, read as float16, as float32."""
    return low_half(words >> 16)


def rounded_fp16(x: Tensor) -> Tensor:
    """What float16 holds of x, within its range.  A zero has no sign."""
    return (x.to(torch.float16) + 0.0).to(torch.float32)


def rounded_bf16(x: Tensor) -> Tensor:
    """What bfloat16 holds of x.  A zero has no sign."""
    return (x.to(torch.bfloat16) + 0.0).to(torch.float32)


def low_half_bf16(words: Tensor) -> Tensor:
    """The low 16 bits of each 32-bit word, read as bfloat16, as float32."""
    return as_float(words << 16)


def high_half_bf16(words: Tensor) -> Tensor:
    """The high 16 bits of each 32-bit word, read as bfloat16, as float32."""
    return as_float(words & -65536)


def half(words: Tensor) -> Tensor:
    """16-bit words read as float16, as float32."""
    return words.contiguous().view(torch.float16).to(torch.float32)


def half_bf16(words: Tensor) -> Tensor:
    """16-bit words read as bfloat16, as float32."""
    return words.contiguous().view(torch.bfloat16).to(torch.float32)


def e4m3(words: Tensor) -> Tensor:
    """Bytes read as e4m3, as float32."""
    words = words.to(torch.int32) & 255
    number = low_half(((words & 127) << 7) | ((words & 128) << 8)) * 256.0
    return torch.where((words & 127) == 127, torch.nan, number)


def high_e4m3(words: Tensor) -> Tensor:
    """The high bytes of 16-bit words read as e4m3, as float32."""
    return e4m3(words >> 8)


def e5m2(words: Tensor) -> Tensor:
    """Bytes read as e5m2, as float32."""
    return low_half(words.to(torch.int32) << 8)


def e2m1(words: Tensor) -> Tensor:
    """Nibbles read as e2m1, as float32."""
    words = words.to(torch.int32)
    return low_half(((words & 7) << 9) | ((words & 8) << 12)) * 16384.0


def e8m0(words: Tensor) -> Tensor:
    """Bytes read as the power of two whose exponent they are, as float32; 255 is NaN."""
    words = words.to(torch.int32) & 255
    return as_float((words << 23) | torch.where(words == 255, 0x400000, 0).to(torch.int32))


def chosen(codes: Tensor, levels: tuple[float | Tensor, ...]) -> Tensor:
    """The level of each code, float32."""
    table = torch.stack([torch.as_tensor(level, dtype=torch.float32) for level in levels])
    return table.to(codes.device)[codes.long()]


def scale_over_zero_point(words: Tensor, mask: int) -> Tensor:
    """The float32 whose lowest mantissa bits, under `mask`, hold a zero point: those bits cleared."""
    return as_float(words & ~mask)


# ---- pages -----------------------------------------------------------------------------------------------------------


def section(pages: Tensor, offset: int, count: int, dtype: torch.dtype) -> Tensor:
    """`count` elements from byte `offset` of every blob: uint8 (..., bytes) -> dtype (..., count)."""
    size = dtype.itemsize
    return pages[..., offset : offset + count * size].contiguous().view(dtype)


def word_rows(pages: Tensor, offset: int, rows: int, words: int) -> Tensor:
    """The words of a stream, one row a token: uint8 (..., pages, bytes) -> int16 (..., tokens, words)."""
    return section(pages, offset, rows * words, torch.int16).unflatten(-1, (rows, words)).flatten(-3, -2)


def byte_rows(pages: Tensor, offset: int, rows: int, words: int) -> Tensor:
    """The bytes of a stream whose rows are tokens t and t + 32, one row a token: uint8 (..., pages, bytes) ->
    (..., tokens, words)."""
    both = section(pages, offset, 2 * rows * words, torch.uint8).unflatten(-1, (rows // 32, 32, words, 2))
    return both.movedim(-1, -3).flatten(-5, -2)


def rows_of_bytes(parts: tuple[Tensor, ...], *, paired: bool) -> Tensor:
    """The inverse of `byte_rows`, or of `word_rows` for their low and high bytes: uint8 (..., tokens, words) each ->
    (..., bytes of a section)."""
    if not paired:
        return torch.stack(parts, -1).flatten(-3)
    (part,) = parts
    tokens, words = part.shape[-2:]
    blocks = part.reshape(*part.shape[:-2], tokens // 64, 2, 32, words)
    return blocks.movedim(-3, -1).flatten(-4)


def digits_bytes(codes: Tensor, row: int) -> Tensor:
    """Ternary digits as bytes: uint8 (..., channels) -> (..., row), those of channels x, x + row, ... in byte x."""
    padded = torch.nn.functional.pad(codes.to(torch.int32), (0, 5 * row - codes.shape[-1])).unflatten(-1, (5, row))
    number = padded[..., 0, :]
    for place in range(1, 5):
        number = 3 * number + padded[..., place, :]
    return ((256 * number + 242) // 243).to(torch.uint8)


def digit(bytes_: Tensor, place: int) -> Tensor:
    """The ternary digits at a place of bytes: what stands behind the point before it, times 3."""
    rest = (bytes_.to(torch.int32) * 3**place) & 255
    return ((3 * rest) >> 8).to(torch.uint8)


def bytes_of(words: Tensor) -> Tensor:
    """Words as bytes: (..., n) -> uint8 (..., n * size)."""
    return words.contiguous().view(torch.uint8)


def heads_of(shared: Tensor, groups: int, heads: int) -> Tensor:
    """Metadata that heads share, once for each head: (B, pages, groups * n) -> (B, H, pages, n)."""
    batch, pages, _ = shared.shape
    return shared.reshape(batch, pages, groups, -1).movedim(2, 1).repeat_interleave(heads, 1)


def entries(words: Tensor, blocks: int, groups: int, *, token_major: bool) -> Tensor:
    """Metadata words of pages as (B, H, token blocks, groups): (B, H, pages, blocks * groups), in either order."""
    if token_major:
        return words.unflatten(-1, (blocks, groups)).flatten(2, 3)
    return words.unflatten(-1, (groups, blocks)).mT.flatten(2, 3)
