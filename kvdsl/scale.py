"""How blocks of numbers are measured, and how the measure is stored."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

from .codes import When
from .part import ALL, Block, Count, Part

Range = Literal["minmax", "minmax_zero", "absmax", "signed_absmax", "norm", "absmean"]
Zero = Literal["min", "point", "in_scale"]
Refit = Literal["least_squares", "weighted_least_squares", "norm"]
MetaFormat = Literal["fp32", "fp16", "bf16", "e4m3", "e8m0"]


@dataclass(frozen=True, repr=False)
class Scale(Part):
    """How a block of n numbers is measured and how the measure is stored.

    range    With L levels and x the block: `minmax` has lo, hi = clip*min, clip*max; `minmax_zero` widens that to hold
             0; `absmax` has s = clip*max|x| / the top level; `signed_absmax` has s = the x of largest size / the lowest
             level; `norm` has s = clip*|x|/sqrt(n), `absmean` s = clip*mean|x|.  None: the code's own, `minmax` for
             Uniform, `absmax` for Float, `norm` for Codebook (of calibrated levels `minmax`,
             whose middle and half width these levels of -1..1 then stand on).
    clip     a tuple is a search: the candidate under which the block's squared error is least, the first of equals
    quantile of the n sizes |x| in rising order that at place floor(quantile*n) bounds what is measured: the ends of a
             range are those of numbers brought within it.  None: all of them as they are
    zero     what is stored beside s where the range has an offset: `min` stores lo, `point` the integer round(-lo/s),
             `in_scale` that integer in the lowest mantissa bits of an fp32 s
    refit    a second s for the codes that the first one gave, l their levels: `least_squares` <x,l>/<l,l>,
             `weighted_least_squares` the same weighted by x^2, `norm` |x|/|l|
    dtype    of what is stored; e8m0 is a power of two, 2^(floor(log2 max|x|) - floor(log2 top level)) (OCP MX 1.0)
    scale    a second level: a calibrated scale that s is divided by before it is stored
    """

    inner = ("block", "scale")
    block: Block = Block()
    _: KW_ONLY
    range: Range | None = None
    clip: float | tuple[float, ...] = 1.0
    quantile: float | None = None
    zero: Zero = "min"
    refit: Refit | None = None
    dtype: MetaFormat = "fp16"
    scale: Scale | None = None
    when: When = "online"

    @property
    def whole(self) -> bool:
        """Whether the range ends where the numbers do."""
        return self.clip == 1 and self.quantile is None

    def bounding(self, numbers: int) -> int:
        """The place of the size that bounds a block of so many numbers."""
        assert self.quantile is not None
        return math.floor(self.quantile * numbers)


def per_token(channels: Count = ALL, heads: Count = 1, **scale: Any) -> Scale:
    """One scale for each token and each group of `channels` (and of `heads` kv heads)."""
    return Scale(Block(1, channels, heads), **scale)


def per_channel(tokens: Count = ALL, **scale: Any) -> Scale:
    """One scale for each channel of a head and each group of `tokens`."""
    return Scale(Block(tokens, 1), **scale)


def per_tensor(**scale: Any) -> Scale:
    """One scale for all tokens, channels and heads of a layer."""
    return Scale(Block(ALL, ALL, ALL), **scale)
