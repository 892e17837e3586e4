"""What every generated torch module shares: the pieces of device.py, under the same names, as vectorised torch.

Also how pages are taken apart: sections of bytes, the rows of words in them, the numbers stored beside codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 65504.0


def finite(x: Tensor) -> Tensor:
    """NaN to 0, and everything into the range of float16."""
    return torch.nan_to_num(x, nan=0.0, posinf=LARGEST, neginf=-LARGEST).clamp(-LARGEST, LARGEST)


def quotient(dividend: Tensor, divisor: Tensor) -> Tensor:
    """dividend / divisor, rounded to nearest."""
    return dividend / divisor


exact_quotient = quotient


def over(dividend: Tensor, divisor: float) -> Tensor:
    """dividend / divisor, rounded to nearest (torch would multiply by the inverse of a number)."""
    return dividend / torch.full_like(dividend, divisor)


def nearest(x: Tensor) -> Tensor:
    """Round to the nearest integer, ties to even."""
    return torch.round(x)


def nearest_half_up(x: Tensor) -> Tensor:
    """Round to the nearest integer, ties up."""
    even = torch.round(x)
    return even + (x - even == 0.5).to(x.dtype)


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


def _bits(x: Tensor, dtype: torch.dtype, nan: int) -> Tensor:
    words = (x.to(dtype) + 0.0).view(torch.int16).to(torch.int32) & 0xFFFF
    return torch.where(x == x, words, nan)


def bits_fp16(x: Tensor) -> Tensor:
    """The nearest float16's bits, as int32; x within its range.  A zero has no sign."""
    return _bits(x, torch.float16, 0x7E00)


def bits_bf16(x: Tensor) -> Tensor:
    """The nearest bfloat16's bits, as int32.  A zero has no sign."""
    return _bits(x, torch.bfloat16, 0x7FC0)


def bits_fp32(x: Tensor) -> Tensor:
    """A float32's bits.  A zero has no sign."""
    return as_int(x + 0.0)


def low_half(words: Tensor) -> Tensor:
    """The low 16 bits of each 32-bit word, read as float16, as float32."""
    return words.to(torch.int16).contiguous().view(torch.float16).to(torch.float32)


def high_half(words: Tensor) -> Tensor:
    """The high 16 bits of each 32-bit word, read as float16, as float32."""
    return low_half(words >> 16)


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


def scale_over_zero_point(words: Tensor, mask: int) -> Tensor:
    """The float32 whose lowest mantissa bits, under `mask`, hold a zero point: those bits cleared."""
    return as_float(words & ~mask)


def mapped(x: Tensor, matrix: Tensor, shift: Tensor | None) -> Tensor:
    """float32 (n, H, T, in) by a map (H or 1, out, in) and a shift (H or 1, out), summed in float64, rounded once."""
    y = x.to(torch.float64) @ matrix.mT.to(torch.float64)
    return (y if shift is None else y + shift[:, None].to(torch.float64)).to(torch.float32)


# ---- pages -----------------------------------------------------------------------------------------------------------


def section(pages: Tensor, offset: int, count: int, dtype: torch.dtype) -> Tensor:
    """`count` elements from byte `offset` of every blob: uint8 (..., bytes) -> dtype (..., count)."""
    size = dtype.itemsize
    return pages[..., offset : offset + count * size].contiguous().view(dtype)


def byte_rows(pages: Tensor, offset: int, rows: int, words: int, *, paired: bool) -> tuple[Tensor, ...]:
    """The bytes of a stream, one row a token: uint8 (..., pages, bytes) -> (..., tokens, words).

    Two tensors, low and high bytes, where a row of words is one token; one where it is tokens t and t + 32.
    """
    lead = pages.shape[:-2]
    both = pages[..., offset : offset + 2 * rows * words].reshape(*lead, -1, 2 * words if not paired else 64 * words)
    if not paired:
        both = both.reshape(*lead, -1, words, 2)
        return both[..., 0], both[..., 1]
    both = both.reshape(*lead, -1, 32, words, 2).movedim(-1, -3)
    return (both.reshape(*lead, -1, words),)


def rows_of_bytes(parts: tuple[Tensor, ...], *, paired: bool) -> Tensor:
    """The inverse of `byte_rows`: uint8 (..., tokens, words) each -> (..., bytes of a section)."""
    if not paired:
        return torch.stack(parts, -1).flatten(-3)
    (part,) = parts
    tokens, words = part.shape[-2:]
    blocks = part.reshape(*part.shape[:-2], tokens // 64, 2, 32, words)
    return blocks.movedim(-3, -1).flatten(-4)


def bytes_of(words: Tensor) -> Tensor:
    """Words as bytes: (..., n) -> uint8 (..., n * size)."""
    return words.contiguous().view(torch.uint8)


def extremes(x: Tensor, tokens: int, channels: int, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lowest, highest, and 1 where a NaN is, of every block: (n, H, T, D) -> (n, H/heads, T/tokens, D/channels)."""
    n, h, t, d = x.shape
    blocks = x.reshape(n, h // heads, heads, t // tokens, tokens, d // channels, channels)
    clean = finite(blocks)
    spoilt = torch.isnan(blocks).any(-1).any(-2).any(2)
    return clean.amin((2, 4, 6)), clean.amax((2, 4, 6)), spoilt.to(torch.int32)


def spread(numbers: Tensor, tokens: int, channels: int, heads: int) -> Tensor:
    """A number of every block at each of its places: the shape that `extremes` took, up to expansion."""
    for dim, count in ((1, heads), (2, tokens), (3, channels)):
        if numbers.shape[dim] > 1 or dim == 2:
            numbers = numbers.repeat_interleave(count, dim)
    return numbers


def heads_of(shared: Tensor, groups: int, heads: int) -> Tensor:
    """Metadata that heads share, once for each head: (B, pages, groups * n) -> (B, H, pages, n)."""
    batch, pages, _ = shared.shape
    return shared.reshape(batch, pages, groups, -1).movedim(2, 1).repeat_interleave(heads, 1)


def entries(words: Tensor, blocks: int, groups: int, *, token_major: bool) -> Tensor:
    """Metadata words of pages as (B, H, token blocks, groups): (B, H, pages, blocks * groups), in either order."""
    if token_major:
        return words.unflatten(-1, (blocks, groups)).flatten(2, 3)
    return words.unflatten(-1, (groups, blocks)).mT.flatten(2, 3)


def used(numbers: Tensor, weights: Tensor, tokens: int) -> Tensor:
    """Numbers (B, H, token blocks, ...) with those of blocks that no weight reaches made 0: they may be anything."""
    reached = (weights > 0).any(-1).unflatten(-1, (-1, tokens)).any(-1)
    return torch.where(reached[..., None], numbers, 0.0)
