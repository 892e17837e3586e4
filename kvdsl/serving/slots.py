"""Where the exact rows of running requests stand: each has a slot, found again by the engine's block it is filling."""

from __future__ import annotations

from collections import OrderedDict

from kvdsl.errors import CacheError


class Slots:
    """`count` slots.  An engine says of a request no more than its blocks, and not that it is gone: a request is known
    by the block that holds its last token, and the slot that was used longest ago is taken when a new one is needed.

    So there have to be more slots than requests can run: twice as many, and none that runs has to wait for all others
    to come and go before it is its turn again.
    """

    def __init__(self, count: int) -> None:
        self._free = list(range(count - 1, -1, -1))
        self._slots: OrderedDict[int, tuple[int, ...]] = OrderedDict()  # slot -> blocks that it is known by
        self._known: dict[int, int] = {}  # block -> slot

    def take(self, block: int | None, using: set[int]) -> int:
        """The slot that is known by this block, or, for None, another one than those in `using`.  CacheError where
        there is none."""
        if block is not None:
            if block not in self._known:
                raise CacheError(
                    f"block {block}: the exact rows of its request are gone; more requests run than there are slots for"
                )
            return self._known[block]
        if self._free:
            return self._free.pop()
        slot = next((slot for slot in self._slots if slot not in using), None)
        if slot is None:
            raise CacheError(f"slots: all {len(using)} are in use; let fewer requests run at a time")
        self._forget(slot)
        return slot

    def keep(self, slot: int, blocks: tuple[int, ...]) -> None:
        """From now on the slot is known by these blocks, and by no others."""
        self._forget(slot)
        for block in blocks:
            other = self._known.pop(block, None)
            if other is not None:
                self._slots[other] = tuple(b for b in self._slots[other] if b != block)
            self._known[block] = slot
        self._slots[slot] = blocks

    def _forget(self, slot: int) -> None:
        for block in self._slots.pop(slot, ()):
            del self._known[block]
