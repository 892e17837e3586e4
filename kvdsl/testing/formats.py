"""The formats of metadata, how far storing moves a number, and what else bounds are made of."""

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
OVER_BLOCK = (2, 4, 6)  # of blocks (B, H/bh, bh, T/bt, bt, D/bc, bc)
SLACK = 12 * 2.0**-24


def deviation(value: Tensor, dtype: str, spare: int = 0) -> Tensor:
    """dev(value): how far storing moves it; `spare` last bits of the number are not its own."""
    unit, least, largest = FORMATS[dtype]
    factor = 1 << spare
    return (value.abs() * unit * factor).clamp(min=least * factor) + (value.abs() - largest).clamp(min=0)


def raised(scale: Scale, step: Tensor, outer: Tensor | float) -> Tensor:
    """Steps of blocks, no less than the scale's floor times a second level."""
    return torch.maximum(step, torch.ones_like(step) * scale.floor * outer) if scale.floor else step


def power_of_two(scale: Scale, largest: Tensor, top: float) -> Tensor:
    """The step, float64, of blocks whose largest sizes these are, under levels up to `top`."""
    assert not isinstance(scale.clip, tuple)
    size = (scale.clip * largest).float()
    if scale.exponent == "floor":
        power = torch.frexp(size).exponent - torch.frexp(torch.tensor(float(top))).exponent
    else:
        half, power = torch.frexp(size / top)  # 1/2 to 1
        power = power - 1 + (half > 0.5 if scale.exponent == "ceil" else half > 0.5**0.5).int()
    return torch.exp2(torch.where(largest == 0, -126, power.clamp(-126, 127)).double())


def within_quantile(scale: Scale, numbers: Tensor) -> Tensor:
    """Numbers (B, H/bh, bh, T/bt, bt, D/bc, bc) brought within the size at their block's quantile, if there is one."""
    if scale.quantile is None:
        return numbers
    rising = numbers.abs().permute(0, 1, 3, 5, 2, 4, 6).flatten(4).sort(-1).values
    size = rising[..., scale.bounding(rising.shape[-1])][:, :, None, :, None, :, None]
    return torch.maximum(torch.minimum(numbers, size), -size)
