"""How many tokens a program reads at a time, and how many of them it multiplies at once.

Every tile has its maxima, and sums that are scaled by how much those grew.  At 2 bits a number that is a tenth of the
loop's instructions in tiles of 64 tokens, and half of it in tiles of 128 (`kvdsl compile token2`); words of more bits
would not leave the registers for it.
"""

from __future__ import annotations

from math import gcd

from kvdsl.scheme import SIDES, Scheme, Uniform
from kvdsl.shape import Shape
from kvdsl.window import TILE, tile_tokens

PAIR = 32  # tokens t and t + 32 share a word where one token is too narrow for a tensor-core operand
NARROWEST = 16  # words a tensor-core operand wants along its inner side
WIDE_BITS = 768  # codes of both sides of a token of a head, up to which a tile may have more than TILE tokens


def tile(scheme: Scheme, shape: Shape, *, heavy: bool) -> int:
    """Tokens of a tile; `heavy`: numbers are decoded in the loop, or are float32, or planes are narrower than an
    operand or, on both sides, of groups with scales of their own and two streams, so that there are many, each with
    instructions of its own."""
    bits = [code.bits or 0 for code in (scheme.side(side).code for side in SIDES) if isinstance(code, Uniform)]
    return TILE if heavy or sum(bits) * shape.head_dim > WIDE_BITS else tile_tokens(scheme)


def sub_tile(tokens: int, blocks: list[int], *, narrow: bool) -> int:
    """Tokens of a tile that are multiplied at once: of one block of each of `blocks` tokens; `narrow`: half a pair."""
    return min(tokens, PAIR) if narrow else gcd(tokens, *(block if block % TILE == 0 else PAIR for block in blocks))
