"""Parts of a page: the channels of a plane; sections that hold no codes and no scales, as vectors of low rank, single
numbers, chosen channels."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """The channels of a plane: lanes [low, high) of a tile of words, lane x being channel start + step * x."""

    start: int
    low: int
    high: int
    step: int = 1

    @property
    def channels(self) -> range:
        return range(self.start + self.step * self.low, self.start + self.step * self.high, self.step)


@dataclass(frozen=True)
class Factors:
    """Vectors of low rank: of every `tokens` tokens a block of `rank` vectors, a row each, and as many numbers a token.
    What the page's tokens have of one vector is a row, too, so that tokens side by side are so in memory; in fp16,
    offsets in bytes from the head blob's start."""

    rank: int
    tokens: int
    blocks: int
    offset: int
    vectors_offset: int = 0


@dataclass(frozen=True)
class Slots:
    """Single numbers in fp16 and their places, a byte each; offsets in bytes from the head blob's start.

    Of keys every slot is a row of the page's tokens, and places are channels; of values every slot of every 64 tokens
    is a row of channels, and places are tokens of the 64."""

    count: int
    rows: int
    width: int
    offset: int
    places_offset: int = 0

    @property
    def entries(self) -> int:
        return self.rows * self.width


@dataclass(frozen=True)
class Beside:
    """Numbers of channels that are chosen anew, beside codes of all channels, `count` a token: in fp16, or `bits` of
    codes whose lowest `below` stand among the others', those of as many tokens as fill a byte in one, the first token's
    lowest.  Bytes from the head blob's start."""

    count: int
    bits: int
    below: int
    offset: int

    @property
    def together(self) -> int:
        """Tokens that share a byte."""
        return max(1, 8 // self.bits)

    def size(self, tokens: int) -> int:
        """Bytes of so many tokens."""
        return tokens * self.count * self.bits // 8

    def rows_of(self, tokens: int) -> str:
        """What the section of so many tokens holds, in words."""
        each = f"bytes, {self.bits} bits of {self.together} tokens each" if self.below else "fp16"
        return f"{tokens // self.together} rows of {self.count} {each}"


@dataclass(frozen=True)
class Across:
    """Factors of tiles in fp16: one a token of the page, or a row of channels for every `tokens` tokens; from the head
    blob's start."""

    tokens: int
    of_tokens: bool
    entries: int
    offset: int


@dataclass(frozen=True)
class Channels:
    """Which channels are chosen, rising, a byte each, `count` of them for every `tokens` tokens; from the head blob's
    start."""

    count: int
    tokens: int
    blocks: int
    offset: int
