"""The codes of the language: alphabets that a number, or a whole vector, is written in."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass, replace
from typing import TYPE_CHECKING, Literal

from .part import ALL, Block, Count, Part, Sizes, counted

if TYPE_CHECKING:
    from .scheme import Store, TopChannels

Rounding = Literal["even", "half_up", "away", "floor"]
FloatRounding = Literal["even", "away", "half_down"]
Grid = Literal["ends", "cells"]
FloatFormat = Literal["fp16", "fp32", "e4m3", "e5m2", "e2m1"]
Law = Literal["normal", "beta", "angle", "calibrated"]
Weights = Literal["fisher"]
Match = Literal["moments"]
SketchBasis = Literal["orthogonal", "gaussian", "hadamard"]
Fill = Literal["mean", "clamp", "zero"]
When = Literal["online", "calibrated"]

FLOAT_BITS: dict[FloatFormat, int] = {"fp16": 16, "fp32": 32, "e4m3": 8, "e5m2": 8, "e2m1": 4}
SLOT_TOKENS = 64  # of a block of single numbers that are kept as they are: those of one tile
TRITS = 5  # ternary digits that one byte holds: 3**5 = 243


@dataclass(frozen=True, repr=False)
class Uniform(Part):
    """Equally spaced levels, coded as integers 0..levels-1.

    grid `ends`: the range's ends are levels, step (hi-lo)/(L-1), decoded at lo + s*c.
    grid `cells`: the range is cut into L cells, step (hi-lo)/L, decoded at lo + s*(c + 1/2).
    `levels` None: 2**bits, but 2**bits - 1 under `absmax` with grid `ends`, so that 0 is a level and the grid is even.
    `bits` None: of three levels, which are stored five in a byte.
    """

    bits: int | None = None
    _: KW_ONLY
    levels: int | None = None
    grid: Grid = "ends"
    rounding: Rounding = "even"


@dataclass(frozen=True, repr=False)
class Float(Part):
    """The number itself over the scale (1 without one), rounded to a float format, saturating.

    e4m3, e5m2: the 8-bit formats of OCP (e4m3 without infinities); e2m1: 0, 1/2, 1, 3/2, 2, 3, 4, 6 and the same with a
    minus sign.

    rounding  of a number that is as near to one as to another, small floats alone: to the one whose last bit is 0, away
              from zero, or `half_down` to the lower one
    """

    format: FloatFormat = "fp16"
    _: KW_ONLY
    rounding: FloatRounding = "even"

    @property
    def plain(self) -> bool:
        """The number itself, stored as a processor stores it: there is no code, and no scale."""
        return self.format in ("fp16", "fp32")


@dataclass(frozen=True, repr=False)
class Codebook(Part):
    """The nearest of a few levels of x/s, the lower one where two are equally near; decoded at s*level.

    levels   the numbers, rising; or the law that the best ones (Lloyd-Max) are computed for: `normal` of variance 1,
             `beta` (a coordinate of a random unit vector of the block's channels, times the root of their number);
             `angle`, without a scale: of radii and angles, an angle of a random vector at its level, in radians;
             `calibrated`: a table of each layer from a file
    bits     of a code; None: as few as the levels need, but three levels are stored five in a byte
    weights  of the squared errors that a calibrated table makes least.  None: all alike, of numbers over their scale.
             `fisher`: the diagonal of the Fisher information, the squared derivative of the model's loss by each
             number, so that the table costs the loss least (KVQuant, arXiv 2401.18079, section 3.3)
    match    what decoded numbers agree in with those that they stand for, over calibration data: codes of a calibrated
             table are then decoded at other levels than numbers are compared with.  None: nothing, they are the same.
             `moments`: mean and standard deviation of numbers over their scale (Q-Norm of KVQuant)
    """

    bits: int | None = None
    levels: Law | tuple[float, ...] = "normal"
    _: KW_ONLY
    weights: Weights | None = None
    match: Match | None = None

    def __post_init__(self) -> None:
        if isinstance(self.levels, list):
            object.__setattr__(self, "levels", tuple(self.levels))


@dataclass(frozen=True, repr=False)
class Vectors(Part):
    """The nearest of 2**bits vectors of `channels` neighbouring channels, the one of the lowest code where several are
    equally near: one code for all of them, `bits / channels` bits a number.  Every such group of channels of every kv
    head has a table of its own, fitted to calibration data by k-means, in float16.  A NaN counts as 0.

    (x_0 - v_0)^2 + (x_1 - v_1)^2 + ... is compared, summed from the left, each step in float32.

    weights  of the squared distances that the tables make least.  None: all vectors of a group count alike.  `fisher`:
             each as the squared derivatives of the model's loss by its numbers add up to (CQ, arXiv 2405.03917,
             centroids guided by the Fisher information)
    """

    bits: int
    _: KW_ONLY
    channels: int
    weights: Weights | None = None

    def groups(self, numbers: int) -> int:
        """How many codes a vector of so many numbers has."""
        return numbers // self.channels


@dataclass(frozen=True, repr=False)
class Additive(Part):
    """A sum of vectors of all channels, one from the table of every stage: the nearest of its 2**bits vectors to what
    the stages before it left of the numbers over their scale, the one of the lowest code where several are equally near
    (residual vector quantization, Juang and Gray, ICASSP 1982).  Every kv head has tables of its own, fitted to
    calibration data one stage after the other, in float16: `bits * stages / channels` bits a number.

    A distance is a sum of squares in float64, of differences in float32; what is left, and the sum when it is read, are
    rounded to float32 after each vector, the first stage's first.

    stages      how many, or how many for each channel of a head, one at least: 0.125 are 16 of 128 channels, 8 of 64
    commuting   every stage has a second code, of the vectors of the same table turned by a quarter, (x, y) -> (-y, x)
                for the pairs that rotary positions turn in a head all of whose channels are rotated, taken behind the
                first: twice the bits.  Rotary positions turn the sum as they turn the entries, so that these may be
                met by the query before codes are looked up (CommVQ, arXiv 2506.18879, section 3.2)
    """

    bits: int
    _: KW_ONLY
    stages: int | float
    commuting: bool = False

    def of(self, channels: int) -> Additive:
        """The same with a count of stages, for heads of so many channels."""
        if not isinstance(self.stages, float):
            return self
        return replace(self, stages=max(1, math.floor(self.stages * channels)))

    @property
    def count(self) -> int:
        """Stages, where these are a count."""
        assert isinstance(self.stages, int)
        return self.stages

    @property
    def codes(self) -> int:
        """Codes of a vector."""
        return self.count * (1 + self.commuting)

    @property
    def row(self) -> int:
        """Bytes of them, one behind the other, the first one's bits lowest."""
        return -(-self.bits * self.codes // 8)


@dataclass(frozen=True, repr=False)
class Sketch(Part):
    """Signs of random projections, c = sign(S x) with 0 taken as -1, scaled by the norm of x (QJL, arXiv 2406.03482).

    S has `dim` rows (ALL: as many as there are channels).  basis `gaussian`: independent normal entries; `orthogonal`:
    blocks of rows that are orthogonal to each other, of norm sqrt(channels), from a QR factorisation; `hadamard`: the
    same from a Hadamard matrix with random signs and rows chosen at random.  The estimate of <q, x> is
    a*|x|*<S q, c>, of x itself a*|x|*S^T c, with a = sqrt(pi/2)/(dim*c_d) so that it is right in the mean: c_d is 1 for
    independent rows, else sqrt(d/2)*Gamma(d/2)/Gamma((d+1)/2).
    """

    dim: Count = ALL
    basis: SketchBasis = "orthogonal"
    seed: int = 0


@dataclass(frozen=True, repr=False)
class Bands(Part):
    """Stretches of the numbers to be coded, each with a store of its own, one behind the other: behind `Polar(levels)`
    the radii, then the angles of the first level, of the second, ..., `levels` + 1 in all; else channels of the vector.

    channels   how many each stretch has, of a vector of as many as they are together, or their shares of any vector's;
               () behind `Polar`
    """

    inner = ("stores",)
    stores: tuple[Store, ...] = ()
    _: KW_ONLY
    channels: Sizes = ()

    def __post_init__(self) -> None:
        for field in ("stores", "channels"):
            if isinstance(getattr(self, field), list):
                object.__setattr__(self, field, tuple(getattr(self, field)))

    @property
    def head_dim(self) -> int | None:
        """Channels of the vector, where the stretches say so."""
        return sum(counted(self.channels, 0)) or None

    def counts(self, head_dim: int) -> tuple[int, ...]:
        """Channels of each stretch of a vector of `head_dim`."""
        return counted(self.channels, head_dim)


@dataclass(frozen=True, repr=False)
class Shared(Part):
    """Of values: they are the first of the stretches that keys are stored in (`Bands`), and nothing is stored of them.

    So a token is one record of a latent vector, which is its value and the first part of its key, and of a key with
    rotary positions: what multi-head latent attention keeps (DeepSeek-V2, arXiv 2405.04434, section 2.1), once the
    model's up-projections are on the query and on the output.
    """


@dataclass(frozen=True, repr=False)
class LowRank(Part):
    """x_t = sum_j a[t, j] b[j] for the vectors x_t of every `tokens` tokens of a head: `rank` vectors b, and as many
    numbers a token, all in fp16 (GEAR, arXiv 2403.05527, section 3).

    The a[., j] are orthonormal but for a factor, and b = a^T x over its square, so that what is read is x projected:
    nothing grows.  They are found by subspace iteration on the rows x of a block, a = orth(x p), p = x^T a, `loops`
    times from a random p.  The factor of a is the power of two at or above sqrt(tokens): numbers of a are near 1, and
    those of b no larger than those of x.

    seed    of the first p, whose numbers are normal
    """

    rank: int = 4
    _: KW_ONLY
    tokens: int = 64
    loops: int = 3
    seed: int = 0

    @property
    def factor(self) -> float:
        """What a is multiplied by, and b divided."""
        return 2.0 ** math.ceil(math.log2(self.tokens) / 2)


@dataclass(frozen=True, repr=False)
class Sparse(Part):
    """The largest and the smallest numbers of every line, which are kept in fp16, each with its place (KVQuant, arXiv
    2401.18079, section 3.4; GEAR, arXiv 2403.05527, section 3).  Of keys behind PreRope they are numbers without
    positions.

    The store's own codes and ranges are of a vector that has another number in their places.  What is kept is what
    these leave of them, so that they are read as they are, but for rounding.

    share   of a line's n numbers floor(share n / 2), one at least, are taken as the largest and as many as the smallest
    line    the numbers that are compared: Block() a token's channels, Block(heads=ALL) those of all heads,
            Block(64, 1) a channel's 64 tokens, Block(ALL, 1) all of a channel's, of calibration data
    slots   how many are kept at most: of keys of every token of a head, whose query is gathered; of values of every
            channel of 64 tokens, whose weights are gathered.  Where more are taken, the least of them stay in the codes
    fill    what stands in for them: the `mean` of the line, its largest or smallest number that is not taken (`clamp`),
            or `zero`.  Of thresholds, their middle, the one that is exceeded, or 0
    when    `online`: each line is sorted.  `calibrated`: what is below the one or above the other of two thresholds of
            its channel is taken, that share of calibration data
    """

    inner = ("line",)
    share: float = 0.01
    line: Block = Block()
    _: KW_ONLY
    slots: int = 2
    fill: Fill = "mean"
    when: When = "online"

    def taken(self, numbers: int) -> int:
        """How many of a line's numbers are taken as the largest, and as the smallest, without thresholds."""
        return max(1, math.floor(self.share * numbers / 2))

    @property
    def tokens(self) -> int:
        """Tokens that wait for one another: those of whole lines, and of a block of slots."""
        return math.lcm(SLOT_TOKENS, self.line.tokens) if isinstance(self.line.tokens, int) else SLOT_TOKENS


@dataclass(frozen=True, repr=False)
class Chosen(Part):
    """Numbers of the outlier channels that are chosen anew every few tokens, beside codes of all channels: no part of a
    spec.

    choice   which channels
    bits     of each: 16 where what is left of them is kept in fp16, else those of a code above its lowest ones
    below    how many of these stand among the codes of all channels
    """

    choice: TopChannels
    bits: int = 16
    below: int = 0

    @property
    def tokens(self) -> int:
        """Tokens that a choice is of."""
        return self.choice.tokens


Code = Uniform | Float | Codebook | Vectors | Additive | Sketch | Bands | Shared | LowRank | Sparse | Chosen

CODES = (Uniform, Float, Codebook, Vectors, Additive, Sketch, Bands, LowRank, Shared)
"""Those that a store may name."""


def width(code: Code) -> int | None:
    """Bits of one code on its own; None where the code says neither bits nor numbers."""
    if isinstance(code, Float):
        return FLOAT_BITS[code.format]
    if isinstance(code, Chosen):
        return code.bits
    if isinstance(code, (Bands, LowRank, Shared, Sparse)):
        return None
    if isinstance(code, Codebook) and code.bits is None and isinstance(code.levels, tuple):
        return max(1, (len(code.levels) - 1).bit_length())
    if in_trits(code):
        return 2
    return 1 if isinstance(code, Sketch) else code.bits


def coupled(code: Code) -> int:
    """How many neighbouring numbers share a code."""
    return code.channels if isinstance(code, Vectors) else 1


def in_trits(code: Code) -> bool:
    """Whether codes are ternary digits, five in a byte: three levels, and no bits asked for."""
    if isinstance(code, Codebook):
        return code.bits is None and isinstance(code.levels, tuple) and len(code.levels) == 3
    return isinstance(code, Uniform) and code.bits is None and code.levels == 3


def trit_bytes(numbers: int) -> int:
    """Bytes that the digits of `numbers` numbers take: an even count, so that a row of 16-bit words is whole words."""
    return 2 * -(-numbers // (2 * TRITS))
