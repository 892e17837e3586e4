"""How blocks of numbers are measured, and how the measure is stored."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

from .codes import When
from .part import ALL, Block, Count, Part

Range = Literal["minmax", "minmax_zero", "absmax", "signed_absmax", "norm", "absmean"]
Zero = Literal["min", "point", "in_scale", "held_in_scale"]
Refit = Literal["least_squares", "weighted_least_squares", "norm", "unit_gain"]
MetaFormat = Literal["fp32", "fp16", "bf16", "e4m3", "e8m0"]
Exponent = Literal["floor", "round", "ceil"]


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
             `in_scale` that integer in the lowest mantissa bits of an fp32 s, of a range that is widened to hold 0;
             `held_in_scale` the same of the range as it is, held to 0..L-1: of a range without 0 numbers saturate
    refit    a second s for the codes that the first one gave, l their levels: `least_squares` <x,l>/<l,l>,
             `weighted_least_squares` the same weighted by x^2, `norm` |x|/|l|, `unit_gain` <x,x>/<x,l>, under which
             what is read, x^, has <x,x^> = <x,x>: a query along x meets x^ as it would x
    dtype    of what is stored; e8m0 is a power of two
    exponent which power of two, of a = clip*max|x|: `floor` 2^(floor(log2 a) - floor(log2 top level)) (OCP MX 1.0),
             under which numbers may lie beyond the top level; `ceil` the least one that is no less than a / the top
             level, under which none does; `round` the one nearest to that in its logarithm
    floor    the least number that is stored of s, of blocks of zeros too: a block that measures less has this one, as
             float32.  0: none, and what measures less than half the dtype's least number has 0, and so are its numbers
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
    exponent: Exponent = "floor"
    floor: float = 0.0
    scale: Scale | None = None
    when: When = "online"

    @property
    def zero_inside(self) -> bool:
        """Whether the zero point stands inside the scale, not beside it."""
        return self.zero in ("in_scale", "held_in_scale")

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
