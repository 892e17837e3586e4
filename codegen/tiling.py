"""How many tokens a program reads at a time, and how many of them it multiplies at once.

Every tile has its maxima, and sums that are scaled by how much those grew.  At 2 bits a number that is a tenth of the
loop's instructions in tiles of 64 tokens, and half of it in tiles of 128 (`kvdsl compile token2`); words of more bits
would not leave the registers for it.
"""

from __future__ import annotations

from math import gcd

from kvdsl.scheme import Scheme
from kvdsl.window import TILE, tile_tokens

PAIR = 32  # tokens t and t + 32 share a word where one token is too narrow for a tensor-core operand
NARROWEST = 16  # words a tensor-core operand wants along its inner side
AHEAD = 128  # bytes that a warp can ask for ahead of time: four of each lane
FITTING = 14080  # bytes of a tile: a processor with 228 KiB keeps two tiles of each of eight programs


def tile(scheme: Scheme, token_bytes: float, *, least: int, heavy: bool) -> int:
    """Tokens of a tile, where one of a head takes `token_bytes` with what is stored of it: the most that leave a
    processor two programs for each of its partitions, of which one works while the other waits.

    `heavy`: numbers are decoded in the loop, or are float32, or planes are narrower than an operand or, on both sides,
    of groups with scales of their own and two streams, so that there are many, each with instructions of its own;
    `least`: the fewest there may be.

    Measured on an H200, 8 x 8 x 131072: `channel3` 627 us in tiles of 128, of which a processor holds 7, and 425 in
    tiles of 64; `q8_0` 628 in tiles of 64 and 577 in tiles of 32.
    """
    if heavy:
        return TILE
    sizes = (tile_tokens(scheme), TILE, least)
    return next((tokens for tokens in sizes if token_bytes * tokens <= FITTING), TILE)


def sub_tile(tokens: int, blocks: list[int], *, narrow: bool) -> int:
    """Tokens of a tile that are multiplied at once: of one block of each of `blocks` tokens; `narrow`: half a pair."""
    return min(tokens, PAIR) if narrow else gcd(tokens, *(block if block % TILE == 0 else PAIR for block in blocks))
