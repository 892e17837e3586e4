"""What a tier measures of all its tokens, channel by channel, and how that is taken out of them and put back.

y = (x - shift) / factor is what is coded; keys meet q * factor, and q . shift is added to their scores; what is read of
values is y^ * factor + shift.  Both belong to a sequence, and stand beside its pages: (B, H, D).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .segments import Measured

LARGEST = 65504.0
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn}
TOPS = {"fp32": torch.finfo(torch.float32).max, "fp16": LARGEST, "bf16": torch.finfo(torch.bfloat16).max, "e4m3": 448.0}


@dataclass(frozen=True)
class Affine:
    """Factor and shift (B, H, D) of a side, in the format that they are stored in; no shift where there is none."""

    factor: Tensor
    shift: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.factor.nbytes + (0 if self.shift is None else self.shift.nbytes)

    def taken(self, x: Tensor) -> Tensor:
        """y of x (B, H, T, D), float32."""
        factor = self.factor.float()[:, :, None]
        x = saturated(x)
        x = x if self.shift is None else x - self.shift.float()[:, :, None]
        return torch.where(factor == 0, 0.0, x / factor).nan_to_num(0.0, LARGEST, -LARGEST)

    def given_back(self, y: Tensor) -> Tensor:
        """x^ of y^ (B, H, T, D), float32."""
        x = y.float() * self.factor.float()[:, :, None]
        return x if self.shift is None else x + self.shift.float()[:, :, None]

    def met(self, query: Tensor) -> tuple[Tensor, Tensor | None]:
        """What codes of keys meet of a query (B, Hq, Q, D), in its dtype, and what is added to all scores, unscaled:
        float32 (B, Hq, Q)."""
        group = query.shape[1] // self.factor.shape[1]
        factor = self.factor.float().repeat_interleave(group, 1)[:, :, None]
        turned = (query.float() * factor).to(query.dtype)
        if self.shift is None:
            return turned, None
        return turned, (query.float() * self.shift.float().repeat_interleave(group, 1)[:, :, None]).sum(-1)

    def where(self, due: Tensor, other: Affine) -> Affine:
        """The other one for sequences that are due (B,), this one for all else."""
        pick = due[:, None, None]
        shift = None if self.shift is None else torch.where(pick, other.shift, self.shift)  # type: ignore[arg-type]
        return Affine(torch.where(pick, other.factor, self.factor), shift)

    def chosen(self, index: Tensor) -> Affine:
        """Of chosen sequences, in that order."""
        shift = None if self.shift is None else self.shift.index_select(0, index)
        return Affine(self.factor.index_select(0, index), shift)


def nothing(about: Measured, sizes: tuple[int, ...], device: torch.device) -> Affine:
    """Of sequences that have no token yet."""
    factor = torch.ones(sizes, dtype=DTYPES[about.dtype], device=device)
    return Affine(factor, torch.zeros_like(factor) if about.by == "range" else None)


def measure(about: Measured, x: Tensor, valid: Tensor, query: Tensor | None = None) -> Affine:
    """What is measured of x (B, H, T, D), tokens that are valid (B, T), and of queries (B, Hq, Q, D) where keys are
    balanced against them.  The arithmetic is float32, rounded at every step; a channel with a NaN gets the factor NaN.
    """
    mask = valid[:, None, :, None]
    spoilt = (torch.isnan(x) & mask).any(2)
    x = saturated(x)
    if about.by == "range":
        low = about.clip * torch.where(mask, x, torch.inf).amin(2)
        high = about.clip * torch.where(mask, x, -torch.inf).amax(2)
        none = ~mask.any(2)
        low, high = low.masked_fill(none, 0.0), high.masked_fill(none, 0.0)
        step = stored((high - low) / about.intervals, about.dtype)
        return Affine(step.masked_fill(spoilt, torch.nan), stored(low, about.dtype))
    size = torch.where(mask, x.abs(), 0.0).amax(2)
    if about.by == "sqrt_absmax":
        size = root(size)
    elif about.by == "balance":
        assert query is not None
        other = saturated(query).abs().amax(2).unflatten(1, (x.shape[1], -1)).amax(2)
        size = torch.where(other == 0, 1.0, root(size / other))
    factor = stored(size, about.dtype)
    return Affine(torch.where(factor == 0, 1.0, factor).masked_fill(spoilt, torch.nan), None)


def root(x: Tensor) -> Tensor:
    """The square root, rounded once: float32's own may be one unit off where it is computed by vectors."""
    return x.double().sqrt().float()


def saturated(x: Tensor) -> Tensor:
    """Float32 within float16's range, a NaN taken as 0."""
    return x.float().nan_to_num(0.0, LARGEST, -LARGEST).clamp(-LARGEST, LARGEST)


def stored(x: Tensor, dtype: str) -> Tensor:
    """Clamped to a format's range, and rounded to it."""
    return x.clamp(-TOPS[dtype], TOPS[dtype]).to(DTYPES[dtype])
