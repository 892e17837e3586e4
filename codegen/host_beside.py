"""Numbers of channels that are chosen anew, in torch: what is kept of them beside codes of all channels, and read."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvdsl.scheme import Uniform

from .host import bits_fp16, bytes_of, saturated, to_int16
from .placement import levels
from .side import SidePlan


class Taken(NamedTuple):
    """Which channels of vectors (n, H, T, D) are chosen, int64 (n, H, T / per, count), and whether each number is of
    one."""

    channels: Tensor
    theirs: Tensor


# ---- packing, for both backends


def level_counts(part: SidePlan, theirs: Tensor) -> Tensor:
    """How many levels every channel has in the tokens of every scale, more where numbers (n, H, T, D) are of chosen
    ones, `theirs`: float32 (n, H, T / tokens, D)."""
    assert part.raised is not None and part.uniform is not None and isinstance(part.raised.code, Uniform)
    few, many = (float(levels(code, part.scale)) for code in (part.uniform, part.raised.code))
    return torch.where(theirs[:, :, :: part.span], many, few)


def rows_there(part: SidePlan, x: Tensor, channels: Tensor) -> Tensor:
    """What is kept of x (n, H, T, D), of codes their bits, at chosen channels: bytes (n, H, rows, size of a row)."""
    held, tokens = part.beside, part.choice.tokens
    assert held is not None
    return together(x, channels, tokens, held.bits) if held.below else kept_there(x, channels, tokens)


def kept_there(rest: Tensor, channels: Tensor, tokens: int) -> Tensor:
    """What is kept of `rest` (n, H, T, D) at chosen channels (n, H, T / tokens, count): bytes (n, H, T, 2 count) of
    float16 numbers, whose zeros have no sign."""
    words = bits_fp16(saturated(at_channels(rest, channels.repeat_interleave(tokens, 2))))
    return bytes_of(to_int16(words))


def together(above: Tensor, channels: Tensor, tokens: int, bits: int) -> Tensor:
    """Codes (n, H, T, D) of `bits` bits at chosen channels, those of neighbouring tokens in one byte, the first one's
    lowest: (n, H, T * bits / 8, count)."""
    codes = at_channels(above, channels.repeat_interleave(tokens, 2)).unflatten(2, (-1, 8 // bits))
    shifts = torch.arange(0, 8, bits, device=codes.device)[:, None]
    return (codes.to(torch.int32) << shifts).sum(3).to(torch.uint8)


# ---- reading


def placed(numbers: Tensor, channels: Tensor, tokens: int, head_dim: int) -> Tensor:
    """Numbers (..., T, count) at chosen channels (..., T / tokens, count) of D, 0 elsewhere: float32 (..., T, D)."""
    whole = torch.zeros(*numbers.shape[:-1], head_dim, device=numbers.device)
    there = channels.to(torch.int64).clamp(max=head_dim - 1)  # of a page that was never written they are any
    return whole.scatter(-1, there.repeat_interleave(tokens, -2), numbers)


def at_channels(numbers: Tensor, channels: Tensor) -> Tensor:
    """Numbers (..., D) at chosen channels (..., count)."""
    return numbers.gather(-1, channels.to(torch.int64).clamp(max=numbers.shape[-1] - 1))


def codes_of(rows: Tensor, bits: int) -> Tensor:
    """Codes of `bits` bits, those of neighbouring tokens in one byte: uint8 (..., rows, n) -> (..., tokens, n)."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=rows.device)[:, None]
    return ((rows[..., None, :] >> shifts) & (2**bits - 1)).flatten(-3, -2)


def met_at(query: Tensor, channels: Tensor) -> Tensor:
    """The query (B, H, D, rows) at the chosen channels of every block, (B, H, blocks, count): (..., count, rows)."""
    there = channels.to(torch.int64).clamp(max=query.shape[2] - 1)[..., None].expand(-1, -1, -1, -1, query.shape[3])
    return query[:, :, None].expand(-1, -1, channels.shape[2], -1, -1).gather(3, there)
