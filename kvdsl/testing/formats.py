"""The formats of metadata, and how far storing moves a number."""

from __future__ import annotations

import torch
from torch import Tensor

from kvdsl.scheme import Scale

FORMATS = {
    "fp16": (2.0**-11, 2.0**-25, 65504.0),
    "bf16": (2.0**-8, 2.0**-134, 3.3895e38),
    "fp32": (2.0**-24, 2.0**-150, 3.4028e38),
    "e4m3": (2.0**-4, 2.0**-10, 448.0),
    "e5m2": (2.0**-3, 2.0**-17, 57344.0),
    "e8m0": (0.0, 0.0, 2.0**127),
}
LARGEST = 65504.0


def deviation(value: Tensor, dtype: str, spare: int = 0) -> Tensor:
    """dev(value): how far storing moves it; `spare` last bits of the number are not its own."""
    unit, least, largest = FORMATS[dtype]
    factor = 1 << spare
    return (value.abs() * unit * factor).clamp(min=least * factor) + (value.abs() - largest).clamp(min=0)


def within_quantile(scale: Scale, numbers: Tensor) -> Tensor:
    """Numbers (B, H/bh, bh, T/bt, bt, D/bc, bc) brought within the size at their block's quantile, if there is one."""
    if scale.quantile is None:
        return numbers
    rising = numbers.abs().permute(0, 1, 3, 5, 2, 4, 6).flatten(4).sort(-1).values
    size = rising[..., scale.bounding(rising.shape[-1])][:, :, None, :, None, :, None]
    return torch.maximum(torch.minimum(numbers, size), -size)
