"""How a code becomes a number: an affine map, a table, or the code's own bits as those of a small float.

An affine alphabet costs nothing in the loop: its step and its first level go where the scale goes, and the codes are
read as dirty planes.  The other two are looked up: a tensor-core product reads float16(level * 2**-unit), the level as
nearly as float16 holds it, exactly for the small floats, whose bits only have to be moved.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from kvdsl.codes import width
from kvdsl.errors import ProofError
from kvdsl.scheme import Additive, Codebook, Float, Scale, Sketch, Store, Vectors

EXTREMES = ("absmax", "signed_absmax")  # ranges whose scale is the largest number over the top level


@dataclass(frozen=True)
class Small:
    """A float format of few bits: sign, exponent, `mantissa` bits; numbers below 2**least are spaced as those above.

    converted   some GPUs have an instruction that makes float16 numbers of them
    """

    name: str
    bits: int
    mantissa: int
    least: int
    top: float
    nan: int | None
    converted: bool = False

    @property
    def unit(self) -> int:
        """What a product reads is the number times 2**-unit: the number, where it is converted, else its bits, moved to
        their places in a float16."""
        return 0 if self.converted else self.least + 14

    def value(self, code: int) -> float:
        """The number of a code; NaN and infinity where the format has them."""
        size = code % 2 ** (self.bits - 1)
        field, rest = size >> self.mantissa, size % 2**self.mantissa
        if self.name == "e4m3" and size == self.nan or self.name == "e5m2" and field == 31 and rest:
            return math.nan
        if self.name == "e5m2" and field == 31:
            return math.copysign(math.inf, -1 if code > size else 1)
        number = (rest + (2**self.mantissa if field else 0)) * 2.0 ** (self.least + max(field, 1) - 1 - self.mantissa)
        return math.copysign(number, -1 if code > size else 1)

    def half(self, code: int) -> int:
        """What a product reads of a code, the bits of a float16."""
        if self.converted:
            return half_bits(self.value(code))
        sign, size = divmod(code, 2 ** (self.bits - 1))
        return sign << 15 | size << (10 - self.mantissa)


SMALL = {
    "e4m3": Small("e4m3", 8, 3, -6, 448.0, 0x7F, converted=True),
    "e5m2": Small("e5m2", 8, 2, -14, 57344.0, 0x7E),
    "e2m1": Small("e2m1", 4, 1, 0, 6.0, None),
}


@dataclass(frozen=True)
class Alphabet:
    """The codes of one side.

    kind     affine: level(c) = first + step*c; table: looked up; pattern: the bits of a small float; vectors: looked up
             in memory, of each group of channels in its own table; sums: of several, bytes of a row of them
    bits     of a code
    count    codes that are ever stored
    levels   of a table known now, float32 numbers, one for each of the 2**bits codes; () where there is no such table
    matched  numbers are compared with other levels than codes are decoded at
    unit     what a product reads is level * 2**-unit (affine: the printers' own)
    lift     a scale is multiplied by 2**lift before it is rounded to float16, so that it is near the numbers themselves
    """

    kind: Literal["affine", "table", "pattern", "vectors", "sums"]
    bits: int
    count: int
    levels: tuple[float, ...] = ()
    first: Fraction = Fraction(0)
    step: Fraction = Fraction(1)
    small: Small | None = None
    matched: bool = False
    unit: int = 0
    lift: int = 0

    @property
    def looked_up(self) -> bool:
        """Codes are no numbers: each has to be turned into one."""
        return self.kind != "affine"

    @property
    def given(self) -> bool:
        """The levels come with the parameters, once the kernels run."""
        return self.kind == "table" and not self.levels

    @property
    def vectors(self) -> bool:
        """A code stands for the numbers of several channels."""
        return self.kind == "vectors"

    @property
    def sums(self) -> bool:
        """All codes of a token stand for a sum of vectors of all channels."""
        return self.kind == "sums"

    @property
    def in_memory(self) -> bool:
        """What codes stand for is looked up in memory."""
        return self.vectors or self.sums

    @property
    def fitted(self) -> bool:
        """What codes stand for comes with the parameters."""
        return self.given or self.in_memory

    @property
    def top(self) -> float:
        """The largest size of a level."""
        return self.small.top if self.small else max(map(abs, self.levels))

    @property
    def words(self) -> tuple[int, ...]:
        """What a product reads of each code: the bits of float16(level * 2**-unit)."""
        if self.small:
            return tuple(self.small.half(code) for code in range(2**self.bits))
        return tuple(half_bits(level * 2.0**-self.unit) for level in self.levels)

    @property
    def singles(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The high and the low halves of the levels' float32 bits."""
        bits = [int(struct.unpack("<I", struct.pack("<f", level))[0]) for level in self.levels]
        return tuple(word >> 16 for word in bits), tuple(word & 0xFFFF for word in bits)

    @property
    def halves(self) -> bool:
        """Every level is a float16, so that the number that a product reads is the level itself, scaled."""
        return all(half_number(half_bits(x * 2.0**-self.unit)) == x * 2.0**-self.unit for x in self.levels)


def half_bits(number: float) -> int:
    """The bits of the nearest float16."""
    return int(struct.unpack("<H", struct.pack("<e", number))[0])


def half_number(bits: int) -> float:
    """The number of a float16's bits."""
    return float(struct.unpack("<e", struct.pack("<H", bits))[0])


def single(number: float) -> float:
    """The nearest float32."""
    return float(struct.unpack("<f", struct.pack("<f", number))[0])


def alphabet_of(store: Store, channels: int) -> Alphabet:
    """The alphabet of a store whose blocks span `channels` channels."""
    code, scale, bits = store.code, store.measure, width(store.code)
    if isinstance(code, Float) and not code.plain:
        small = SMALL[code.format]
        lift = _lift(small.top, scale)
        return Alphabet("pattern", small.bits, 2**small.bits, small=small, unit=small.unit, lift=lift)
    if isinstance(code, Sketch):
        from kvdsl.matrices import estimator

        level = single(estimator(code, channels))
        return Alphabet("affine", 1, 2, (-level, level), Fraction(-level), Fraction(2 * level))
    if isinstance(code, Vectors):
        return Alphabet("vectors", code.bits, 2**code.bits)
    if isinstance(code, Additive):
        return Alphabet("sums", 8, 256)
    if not isinstance(code, Codebook):
        bits = 0 if isinstance(code, Float) or bits is None else bits
        return Alphabet("affine", bits, 2**bits)
    assert bits is not None
    if code.levels == "calibrated":
        return Alphabet("table", bits, 2**bits, matched=code.match is not None)
    from kvdsl.levels import table

    levels = tuple(single(level) for level in table(code, channels))
    count = len(levels)
    whole = levels + (levels[-1],) * (2**bits - count)
    line = _line(levels)
    if line is not None:
        return Alphabet("affine", bits, count, whole, *line)
    top = max(map(abs, levels))
    return Alphabet("table", bits, count, whole, unit=math.frexp(top)[1] - 1, lift=_lift(top, scale))


def _lift(top: float, scale: Scale | None) -> int:
    """As far as the scaled scale stays below the largest number, however far it is clipped."""
    if scale is None or scale.range not in EXTREMES:
        return 0
    widest = max(scale.clip) if isinstance(scale.clip, tuple) else scale.clip
    return math.frexp(top / max(1.0, widest))[1] - 1


def _line(levels: tuple[float, ...]) -> tuple[Fraction, Fraction] | None:
    """(first level, step) where float32 arithmetic finds every level as first + step*code."""
    step = single(levels[1] - levels[0])
    if any(single(levels[0] + single(step * code)) != level for code, level in enumerate(levels)):
        return None
    return Fraction(levels[0]), Fraction(step)


def prove(alphabet: Alphabet) -> list[tuple[str, str]]:
    """(statement, method) of what a code's number rests on.  Raises ProofError where it does not hold."""
    if alphabet.given:
        return [("l = the table of the parameters, rounded to float16 where a product reads it", "by definition")]
    if alphabet.vectors:
        return [("l = a number of float16, from the table of the channel's group", "by definition")]
    if alphabet.sums:
        return [("l = a sum of numbers of float16, one of each stage's table", "by definition")]
    method = f"exhaustive ({2**alphabet.bits} codes)"
    if not alphabet.looked_up:
        if not alphabet.levels:
            return []
        first, step = float(alphabet.first), float(alphabet.step)
        found = tuple(single(first + single(step * code)) for code in range(alphabet.count))
        if found != alphabet.levels[: alphabet.count]:
            raise ProofError(f"the levels {alphabet.levels} are no line from {first} in steps of {step}")
        return [(f"level of c = {first:g} + {step:g}*c", f"exhaustive ({alphabet.count} codes)")]
    if alphabet.small:
        for code, bits in enumerate(alphabet.words):
            want = alphabet.small.value(code)
            if math.isfinite(want) and half_number(bits) * 2.0**alphabet.unit != want:
                raise ProofError(f"the bits of {alphabet.small.name} code {code} are not those of {want}")
        if alphabet.small.converted:
            return [(f"every number of {alphabet.small.name} is a float16", method)]
        return [(f"bits of {alphabet.small.name} moved into a float16 = number * 2^-{alphabet.unit}", method)]
    for words, level in zip(_looked_up(alphabet.words), alphabet.levels, strict=True):
        if abs(half_number(words) * 2.0**alphabet.unit - level) > abs(level) * 2.0**-11:
            raise ProofError(f"{level} is looked up as {half_number(words) * 2.0**alphabet.unit}")
    return [(f"looked-up numbers = float16(level * 2^-{alphabet.unit})", method)]


def packed_table(words: tuple[int, ...]) -> tuple[int, ...]:
    """16-bit entries as 32-bit registers for byte selection, signed: the low bytes, four a register, then the high."""
    words += (words[-1],) * (4 - len(words))
    rows = [bytes(word >> shift & 255 for word in words) for shift in (0, 8)]
    return tuple(int.from_bytes(row[i : i + 4], "little", signed=True) for row in rows for i in range(0, len(row), 4))


def _looked_up(words: tuple[int, ...]) -> tuple[int, ...]:
    """The entries as a byte selection finds them again in the registers of `packed_table`."""
    registers = packed_table(words)
    count = len(registers) // 2
    low, high = (
        b"".join((register % 2**32).to_bytes(4, "little") for register in half)
        for half in (registers[:count], registers[count:])
    )
    return tuple(low[code] | high[code] << 8 for code in range(len(words)))
