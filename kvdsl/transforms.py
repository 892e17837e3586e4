"""The transforms of the language: maps of a head's vector before it is coded, undone where it is read.

All but the last are linear (but for a shift).  One that is the same for all tokens costs nothing in the loop over them:
a key's map goes onto the query once, a value's onto the output once.  Rotary positions differ by token, and polar
coordinates are no linear map: both are undone on decoded numbers.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Literal

from .part import ALL, Count, Part, Sizes, counted

RotateKind = Literal["hadamard", "random_hadamard", "orthogonal", "bit_reversal"]
ScaleRule = Literal["absmax", "sqrt_absmax", "balance", "learned"]
ShiftRule = Literal["mean", "middle", "learned"]
Order = Literal["range", "sum", "energy"]
Pairs = Literal["halves", "neighbours"]
Moment = Literal["attention", "own", "balanced"]
Size = Literal["norm", "absmean", "absmax"]


@dataclass(frozen=True, repr=False)
class Rotate(Part):
    """y = R x with R orthonormal, in blocks of `size` channels (ALL: the whole head, or all `heads` of them), or one
    block behind the other of as many channels as each of several sizes says, or of these shares of the head.

    kind     `hadamard`: Sylvester's matrix over sqrt(size), a power of two; `random_hadamard`: the same after random
             signs; `orthogonal`: the Q of a random normal matrix (with the signs of R's diagonal), any size;
             `bit_reversal`: y_i = x_j with the bits of i in reverse order those of j, a power of two
    heads    x is the vectors of so many neighbouring kv heads, one behind the other, and y is cut into as many again:
             an outlier of one head is spread over all of them (RotateKV, arXiv 2501.16383).  Reading one head then
             reads what is stored of all
    seed     of the signs or the matrix; of blocks of several sizes each has the next one
    """

    kind: RotateKind = "hadamard"
    size: Count | Sizes = ALL
    heads: int = 1
    seed: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.size, list):
            object.__setattr__(self, "size", tuple(self.size))


@dataclass(frozen=True, repr=False)
class ChannelScale(Part):
    """y_i = x_i / n_i for every channel of every kv head.

    by   `absmax`: n = max|x|; `sqrt_absmax`: its square root; `balance`: sqrt(max|k|/max|q|), keys against queries;
         `learned`: as given
    when `calibrated`: measured on calibration data; in a scheme with tiers also `online`, on the tokens of a tier
         whenever they are quantized, `prompt`, on those of the prompt that are, or `arrived`, once as well, on all
         tokens that have come behind the sinks when the first ones are quantized, however few these are
    """

    by: ScaleRule = "sqrt_absmax"
    when: Literal["calibrated", "online", "prompt", "arrived"] = "calibrated"


@dataclass(frozen=True, repr=False)
class ChannelShift(Part):
    """y_i = x_i - m_i for every channel of every kv head: the mean, the middle of the range, or as given."""

    by: ShiftRule = "mean"
    when: Literal["calibrated"] = "calibrated"


@dataclass(frozen=True, repr=False)
class Permute(Part):
    """Channels of each kv head in another order, so that those which share a scale are alike, or that what matters is
    coded in more bits: sorted by a measure of calibration data, from the smallest on.

    by      `range`: of a channel's numbers; `sum`: of them; `energy`: of keys, the mean of k^2 of a channel and of q^2
            of the queries that meet it, each taken on its own, half and half (Block-GTQ, arXiv 2606.24033)
    pairs   None: channels go where they go.  `halves`: channels i and i + D/2, `neighbours`: 2i and 2i + 1, which
            rotary positions turn together, stay side by side, sorted by the sum of their measures
    """

    by: Order = "range"
    _: KW_ONLY
    pairs: Pairs | None = None
    when: Literal["calibrated"] = "calibrated"


@dataclass(frozen=True, repr=False)
class Eigenbasis(Part):
    """y = U^T x, the columns of U the eigenvectors of a second moment of calibration data, largest eigenvalue first; or
    y = T x, x^ = T^-1 y^, T no rotation, where two moments are balanced.

    by    `attention`: of keys the moment of the queries that meet them, sum q q^T; of values their own, each weighted
          by k^T (sum q q^T) k of its key, these weights adding up to 1 over a head (OSCAR, arXiv 2605.17757).  `own`:
          of the vectors themselves, sum x x^T.  `balanced`: with K the moment of keys and Q of the queries that meet
          them, T K T^T = T^-T Q T^-1 = S, diagonal, so that y has no direction that is long and weighs little: K = C
          C^T, C^T Q C = V S^2 V^T, T = S^(1/2) V^T C^-1 (WUSH-KV, arXiv 2609.38121), times what makes y as long as x
          in the mean.  Of values Q is of numbers that all weigh alike, as the output's weights are not at hand
    per   a matrix for every kv head, or one for all heads of a `layer`, from the mean of their moments
    rank  how many numbers of y are kept, the first, or their share of all: the others are read as 0.  Of a basis by
          `own`, whose vectors are without their mean, that is what a principal component analysis leaves out
    """

    by: Moment = "attention"
    per: Literal["head", "layer"] = "head"
    when: Literal["calibrated"] = "calibrated"
    rank: Count | float = ALL

    @property
    def matrices(self) -> int:
        """How many come with the parameters: where T is no rotation T and its inverse."""
        return 2 if self.by == "balanced" else 1

    def width(self, head_dim: int) -> int:
        """Numbers of y that are kept, of a head of `head_dim` channels."""
        return counted((self.rank,), head_dim)[0] if isinstance(self.rank, (int, float)) else head_dim


@dataclass(frozen=True, repr=False)
class PreRope(Part):
    """y = R_t^-1 x, x^ = R_t y^: keys as they were before rotary positions, t the token's position in its sequence.

    The frequencies are the model's and come with the parameters; channels beyond them are not rotated.

    interleaved   a pair is two neighbouring channels; else channels i and i + R/2 of the R that are rotated
    """

    interleaved: bool = False


@dataclass(frozen=True, repr=False)
class Polar(Part):
    """y = (r, a): of every pair of channels i and i + D/2 the radius r = sqrt(x_i^2 + x_(i + D/2)^2) and the angle a in
    [0, 2 pi); x^ = (r cos a, r sin a).

    The D/2 radii are the first numbers of y, the angles the others.  These are the pairs that rotary positions turn, so
    that of a key over time the radius stays where it is and the angle alone moves (PolarQuant, arXiv 2502.00527).

    levels   more than 1: the radii are paired again, i and i + D/4, then i and i + D/8, ...; such an angle is in
             [0, pi/2].  Of y come D/2^levels radii first, then the angles level by level: one radius and 2^levels - 1
             angles for 2^levels channels (PolarQuant of Han et al., arXiv 2502.02617, definition 1)
    """

    levels: int = 1


@dataclass(frozen=True, repr=False)
class Balance(Part):
    """y[t, i] = x[t, i] / f, with a factor f for every token of a tile of `tokens` tokens where its channels have
    scales of their own, else for every channel of the tile: the scale along the other axis takes up what its own
    factors would be, so that one number a token, or a channel, is stored beside it, in fp16 (KVarN, arXiv 2606.03458).

    Rows and columns are divided by their sample deviations, within 1e-3..1e3, in turn: a factor that is stored is
    multiplied by the deviation of its token over the channels, or of its channel over the tokens, of numbers over both
    factors; then one along the other axis in the same way; each is kept within e^low..e^high.  Of `loops` rounds that
    one counts after which max/min of the deviations of rows plus max/min of those of columns is least, the first of
    those that are equal to a millionth.

    unit   None; `rms`: all of this of numbers over the root mean square of their tile, which stored factors have, too
    """

    tokens: int = 128
    _: KW_ONLY
    loops: int = 8
    low: float = -0.3
    high: float = 10.0
    unit: Literal["rms"] | None = None


@dataclass(frozen=True, repr=False)
class Pick(Part):
    """y = those of a head's channels that stand in a store of their own, or the others: no part of a spec.

    channels   how many stand in a store of their own, or their share of all
    top        whether y is them
    """

    channels: int | float
    top: bool

    def width(self, head_dim: int) -> int:
        """Numbers of y, of a head of `head_dim` channels."""
        apart = self.channels if isinstance(self.channels, int) else round(self.channels * head_dim)
        return apart if self.top else head_dim - apart


Transform = PreRope | Rotate | Eigenbasis | ChannelScale | ChannelShift | Permute | Polar | Balance
