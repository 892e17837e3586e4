"""The proof that a page's map is one to one: every bit, or ternary digit, of a stream is one of exactly one code."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Literal

from kvdsl.codes import TRITS
from kvdsl.errors import ProofError
from kvdsl.scheme import SIDES

from .layout import Layout, SideLayout, Stream
from .tiling import PAIR


@dataclass(frozen=True)
class BijectionProof:
    """Every bit of a stream's section belongs to exactly one (token, channel, bit) of the code, every digit to one
    (token, channel)."""

    stream: str
    method: str
    cases: int
    unit: Literal["bit", "digit"] = "bit"


def prove_bijection(layout: Layout) -> tuple[BijectionProof, ...]:
    """Check each stream's map over one period of tokens, all channels and bits; the map is affine in the period.

    Raises ProofError where two codes meet or a bit is left over.
    """
    proofs = []
    sides = SIDES[:1] if layout.shared else SIDES
    parts = [(side + " left" * depth, part) for side in sides for depth, part in enumerate(layout.side(side).terms)]
    for side, part in parts:
        for stream in part.streams:
            if stream.digits:
                proofs.append(_prove_digits(side, part, stream))
                continue
            period = 2 * PAIR if stream.paired else 1
            seen = set()
            for token in range(period):
                for channel in range(part.codes):
                    byte, bit = stream.address(token, channel, part.code_width)
                    seen |= {8 * byte + bit + k for k in range(stream.width)}
            wanted = period * part.codes * stream.width
            stride = stream.row(period) * stream.row_words * 16
            if seen != set(range(wanted)) or stride != wanted:
                raise ProofError(f"{side}: the {stream.width}-bit stream does not fill its section exactly once")
            method = f"exhaustive over {period} tokens, affine beyond"
            proofs.append(BijectionProof(f"{side}, {stream.width} bits", method, wanted))
    return tuple(proofs)


def _prove_digits(side: str, part: SideLayout, stream: Stream) -> BijectionProof:
    """Every code is a digit of its own, of a byte of the section, and every byte gives its digits back."""
    period = 2 * PAIR
    seen = {
        stream.address(token, channel, part.plane_width) for token in range(period) for channel in range(part.width)
    }
    size = period * stream.row_words
    full = len(seen) == period * part.width and all(byte < size and digit < TRITS for byte, digit in seen)
    if not full or 2 * stream.row(period) * stream.row_words != size or stream.row_words != part.plane_width:
        raise ProofError(f"{side}: two codes of the stream of digits meet")
    bytes_ = prove_digits()
    method = f"exhaustive over {period} tokens, affine beyond, and over {bytes_} bytes"
    return BijectionProof(f"ternary digits of the {side}", method, len(seen), "digit")


def digits_byte(digits: tuple[int, ...]) -> int:
    """The byte of five ternary digits: 256 times the number 0.ddddd of base 3, rounded up."""
    number = 0
    for digit in digits:
        number = 3 * number + digit
    return -(-256 * number // 3**TRITS)


def prove_digits() -> int:
    """How many bytes are in use: each gives its five digits back, in either half of a 16-bit word, by the arithmetic of
    the kernels.

    The part behind the point of base 3 is a byte, too: times 3 it has the next digit in front of the point.  Rounding
    up added less than 1/243, which the fifth digit does not see yet.
    """
    found = {}
    for digits in product(range(3), repeat=TRITS):
        rest, got = digits_byte(digits) * 0x10001, []
        found[rest] = digits
        for _ in digits:
            rest = 3 * (rest & 0xFF00FF)  # two 16-bit lanes of a register
            got.append(rest >> 8 & 0xFF00FF)
        if got != [digit * 0x10001 for digit in digits] or rest >= 1 << 32:
            raise ProofError(f"the digits {digits} do not come back from their byte")
    if len(found) != 3**TRITS:
        raise ProofError("two tuples of digits have one byte")
    return len(found)
