"""Sums of vectors in torch: codes found stage after stage, as rows of bytes, and what they stand for added up again."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kvdsl.additive import quarter_turned

TOGETHER = 256  # vectors that are compared with all entries at a time
ROUNDED = 2.0**-20  # of a distance: differences are float32
CANCELLED = 2.0**-44  # of what a distance is the difference of


def nearest_sums(x: Tensor, table: Tensor, *, turned: str | None) -> Tensor:
    """The bytes of the codes of x (..., H, T, D), numbers over their scale, in tables (H, stages, entries, D): uint8
    (..., H, T, bytes).  `turned`: how the pairs lie that second codes of a stage are turned by, None without these."""
    codes = []
    for entries in _entries(table, turned):
        code = _nearest(x, entries)
        x = x - _taken(entries, code)
        codes.append(code)
    bits = torch.arange(_bits(table), device=x.device)
    ones = (torch.stack(codes, -1)[..., None] >> bits & 1).flatten(-2)
    ones = torch.nn.functional.pad(ones, (0, -ones.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (ones << torch.arange(8, device=x.device)).sum(-1).to(torch.uint8)


def sums_of(rows: Tensor, table: Tensor, *, turned: str | None) -> Tensor:
    """What rows of bytes (B, H, T, bytes) stand for in tables (H, stages, entries, D): float32 (B, H, T, D)."""
    bits, count = _bits(table), table.shape[1] * (1 if turned is None else 2)
    ones = (rows.to(torch.int64)[..., None] >> torch.arange(8, device=rows.device) & 1).flatten(-2)
    codes = ones[..., : bits * count].unflatten(-1, (count, bits)) << torch.arange(bits, device=rows.device)
    total = torch.zeros((), device=rows.device)
    for entries, code in zip(_entries(table, turned), codes.sum(-1).unbind(-1), strict=True):
        total = total + _taken(entries, code)
    return total


def _bits(table: Tensor) -> int:
    """Bits of a code."""
    return (table.shape[2] - 1).bit_length()


def _entries(table: Tensor, turned: str | None) -> Iterator[Tensor]:
    """The vectors (H, entries, D) that one code after the other is of, float32."""
    for stage in table.to(torch.float32).unbind(1):
        yield stage
        if turned is not None:
            yield quarter_turned(stage, interleaved=turned == "neighbours")


def _nearest(x: Tensor, entries: Tensor) -> Tensor:
    """The nearest of entries (H, entries, D) to x (..., H, T, D), of several the first: whole numbers (..., H, T).

    Products in float64 tell, but where two entries are as near as rounding: there differences are taken one by one."""
    wide, table = x.to(torch.float64), entries.to(torch.float64)
    sizes = wide.square().sum(-1, keepdim=True), table.square().sum(-1)[:, None]
    far = sizes[0] - 2 * (wide @ table.mT) + sizes[1]
    least, code = far.min(-1, keepdim=True)
    doubt = least * ROUNDED + (sizes[0] + sizes[1].amax(-1, keepdim=True)) * CANCELLED
    unsure = ((far <= least + doubt).sum(-1) > 1).nonzero()
    code = code[..., 0]
    for some in unsure.split(TOGETHER):
        at = some.unbind(-1)
        apart = x[at][:, None] - entries[at[-2]]
        code[at] = apart.to(torch.float64).square().sum(-1).argmin(-1)
    return code


def _taken(entries: Tensor, code: Tensor) -> Tensor:
    """Entries of (H, entries, D) by their codes (..., H, T): (..., H, T, D)."""
    heads, count, size = entries.shape
    first = torch.arange(heads, device=code.device)[:, None] * count
    return entries.reshape(-1, size)[code + first]
