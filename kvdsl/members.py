"""The numbers of one sequence in a cache, and how they change: arithmetic on host integers, no tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .errors import CacheError
from .kernels import KernelSet, Side
from .window import Window, windows


class Member(NamedTuple):
    """One sequence.  `t` counts its tokens, `u = t - sinks` those after the sinks.

    length       tokens so far
    keys, values             u below this is packed
    key_floor, value_floor   from this u on the exact row still stands in the ring, packed or not
    gone         u below this is out of reach of every later query (sliding window): no page is kept for it
    start        the first visible t
    """

    length: int = 0
    keys: int = 0
    values: int = 0
    key_floor: int = 0
    value_floor: int = 0
    gone: int = 0
    start: int = 0

    def packed_of(self, side: Side) -> int:
        """How many tokens after the sinks are packed on one side."""
        return self.keys if side == "keys" else self.values

    @property
    def first(self) -> int:
        """The first u that is not packed on both sides."""
        return min(self.keys, self.values)

    @property
    def packed(self) -> int:
        """The first u that is packed on neither side."""
        return max(self.keys, self.values)


class Cut(NamedTuple):
    """What cropping does to one side of a sequence: packed count, floor, and the u range whose codes become exact
    rows."""

    packed: int
    floor: int
    decode: tuple[int, int]


@dataclass(frozen=True)
class Policy:
    """What decides where tokens stand.

    `chunk` is the most tokens after the sinks that go through the ring; `draft` is how many of the newest tokens can be
    cropped without loss; `sliding` is the sliding window in tokens; `exact`: prefill="exact".  The ring has room for
    the scheme's window, the draft and a chunk, so writing a chunk destroys no row that a committed state may read.
    """

    keys: Window
    values: Window
    page_tokens: int
    exact: bool
    sliding: int | None = None
    chunk: int = 16
    draft: int = 0

    @classmethod
    def of(cls, kernels: KernelSet, sliding: int | None = None, draft: int = 0) -> Policy:
        """The policy of a compiled scheme."""
        sides = windows(kernels.scheme)
        exact = kernels.scheme.prefill == "exact"
        return cls(sides["keys"], sides["values"], kernels.page_tokens, exact, sliding, draft=draft)

    @property
    def sinks(self) -> int:
        return self.keys.sinks

    @property
    def ring(self) -> int:
        return max(self.keys.ring, self.values.ring) + self.draft + self.chunk

    def window_of(self, side: Side) -> Window:
        """The window of one side."""
        return self.keys if side == "keys" else self.values

    @property
    def windows(self) -> dict[Side, Window]:
        """The window of each side."""
        return {"keys": self.keys, "values": self.values}

    def after_sinks(self, tokens: int) -> int:
        """u of the token that follows `tokens` tokens."""
        return max(0, tokens - self.sinks)

    def is_large(self, member: Member, count: int) -> bool:
        """Whether `count` fresh tokens need a temporary buffer."""
        return self.after_sinks(member.length + count) - self.after_sinks(member.length) > self.chunk

    def lost(self, length: int) -> int:
        """u below this, a whole number of pages, is seen by no query at position `length` - draft or later."""
        if self.sliding is None:
            return 0
        return max(0, length - self.draft - self.sliding + 1 - self.sinks) // self.page_tokens * self.page_tokens

    def tail(self, member: Member, count: int) -> int:
        """The first u that a temporary buffer for `count` fresh tokens takes over from the ring."""
        kept = self.after_sinks(member.length + count) - self.ring + self.chunk
        return min(member.first, max(member.key_floor, member.value_floor, kept))

    def advance(self, member: Member, count: int, large: bool, due: tuple[int, int] | None = None) -> Member:
        """The sequence after `count` more tokens and the flush; `large` when they came through a temporary buffer.
        `due`: how many keys and values are packed then, where tokens elsewhere count, too, see context.py."""
        length = member.length + count
        keys, values = (self.keys.packed(length), self.values.packed(length)) if due is None else due
        kept = max(self.after_sinks(length) - self.ring + self.chunk, self.tail(member, count) if large else 0)
        return member._replace(
            length=length,
            keys=max(member.keys, keys),
            values=max(member.values, values),
            key_floor=max(member.key_floor, kept),
            value_floor=max(member.value_floor, kept),
            gone=max(member.gone, self.lost(length)),
        )

    def begins(self, before: Member, after: Member) -> tuple[int, int]:
        """Where packing begins for keys and for values: tokens that no later query sees are not packed at all."""
        gone = after.gone if self.exact else before.gone
        return min(max(before.keys, gone), after.keys), min(max(before.values, gone), after.values)

    def touched(self, before: Member, after: Member) -> tuple[int, ...]:
        """The places of the page table that packing from `before` to `after` writes into."""
        spans = zip(self.begins(before, after), (after.keys, after.values), strict=True)
        size = self.page_tokens
        return tuple(sorted({j for begin, end in spans if begin < end for j in range(begin // size, -(-end // size))}))

    def cut(self, member: Member, length: int, window: Window, packed: int, floor: int) -> Cut:
        """One side cropped to `length` tokens.

        Exact rows that still stand in the ring take the place of codes, as far as a fresh sequence would hold them
        exactly: within `draft` tokens the result is that of a fresh sequence.  Where they are gone the packed count
        just shrinks; a block that the cut divides is decoded into exact rows.
        """
        end = self.after_sinks(length)
        restored = max(window.packed(length), -(-floor // window.block) * window.block)
        if restored <= end:
            return Cut(min(packed, restored), floor, (0, 0))
        whole = min(packed, end // window.block * window.block)
        return Cut(whole, min(floor, whole), (whole, min(end, floor)))

    def crop(self, member: Member, length: int) -> tuple[Member, Cut, Cut]:
        """The sequence shortened to `length`.  CacheError when the sliding window has let go of tokens it would
        need."""
        keys = self.cut(member, length, self.keys, member.keys, member.key_floor)
        values = self.cut(member, length, self.values, member.values, member.value_floor)
        seen = 0 if self.sliding is None else max(0, length - self.sliding + 1 - self.sinks)
        if seen < min(member.gone, max(keys.packed, values.packed, keys.decode[1], values.decode[1])):
            raise CacheError(
                f"crop: a query after {length} tokens sees back to token {seen + self.sinks}, but the sliding window "
                f"of {self.sliding} has let go of tokens before {member.gone + self.sinks}; record(draft=) keeps more"
            )
        gone = min(member.gone, min(keys.packed, values.packed) // self.page_tokens * self.page_tokens)
        start = min(member.start, length)
        return Member(length, keys.packed, values.packed, keys.floor, values.floor, gone, start), keys, values

    def resize(self, member: Member) -> Member:
        """The sequence after its rows moved to a ring of this policy's size."""
        kept = self.after_sinks(member.length) - self.ring + self.chunk
        return member._replace(key_floor=max(member.key_floor, kept), value_floor=max(member.value_floor, kept))
