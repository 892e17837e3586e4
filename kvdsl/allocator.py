"""Which pages of a pool are free, held and how often, or kept for reuse: counts on the host, no tensor."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol
from weakref import WeakSet

from .errors import CacheError

ZERO = 0
"""The page that no sequence owns: all bytes are zero.  Table entries that hold nothing point to it."""


class Owner(Protocol):
    """Whoever holds pages: names each one as often as it holds it."""

    def held(self) -> Iterable[int]: ...

    def __hash__(self) -> int: ...


class Resident(NamedTuple):
    """A sequence that could be given up: how many pages it holds, how many of them nobody else holds."""

    name: Hashable
    pages: int
    own: int


class Eviction(Protocol):
    """Asked when a pool is full what is given up.  Both lists come least recently used first."""

    def pages(self, cached: Sequence[int], count: int) -> Sequence[int]:
        """`count` of the pages that nobody holds; they are forgotten."""
        ...

    def sequences(self, residents: Sequence[Resident], count: int) -> Sequence[Hashable]:
        """Sequences that together free at least `count` pages, to be swapped to host memory; none: the step fails."""
        ...


@dataclass(frozen=True)
class LeastRecent:
    """What was used least recently goes first: cached pages, and with `preempt` sequences, too."""

    preempt: bool = False

    def pages(self, cached: Sequence[int], count: int) -> Sequence[int]:
        return cached[:count]

    def sequences(self, residents: Sequence[Resident], count: int) -> Sequence[Hashable]:
        chosen: list[Hashable] = []
        for one in residents if self.preempt else ():
            if count > 0:
                chosen.append(one.name)
                count -= one.own
        return chosen


class Allocator:
    """The ids 1 to `limit` of pages of `page_bytes` bytes, each free, held by table entries, or cached: held by none
    and kept (`keep`) because what it holds can be found again.  A cached page is taken when no other is left.

    The owners' committed tables are the truth; `recount` restores the counts from them, after a failure and when an
    owner was dropped without giving its pages back.

    eviction   who says which cached pages go first
    forgotten  is told of every cached page that is taken
    room       is asked, with the number of pages that are missing, to have some released
    mend       what a full pool's error advises
    """

    def __init__(self, limit: int, page_bytes: int) -> None:
        self.limit, self.page_bytes = limit, page_bytes
        self.owners: WeakSet[Owner] = WeakSet()
        self.eviction: Eviction = LeastRecent()
        self.forgotten: Callable[[int], None] = lambda page: None
        self.room: Callable[[int], None] = lambda missing: None
        self.mend = "build the cache with a capacity= of more tokens, crop or reset it"
        self._holders = [1]
        self._free: list[int] = []
        self._kept: set[int] = set()
        self._cached: dict[int, None] = {}  # a dict keeps the order: least recently released first

    @property
    def in_use(self) -> int:
        """Pages that somebody holds, without the zero page."""
        return len(self._holders) - 1 - len(self._free) - len(self._cached)

    @property
    def cached(self) -> tuple[int, ...]:
        """Pages that nobody holds and that can be found again, least recently used first."""
        return tuple(self._cached)

    @property
    def left(self) -> int:
        """Pages that can be taken: free ones and cached ones."""
        return self.limit - self.in_use

    def holders(self, page: int) -> int:
        """How many table entries point to `page`."""
        return self._holders[page]

    def owned(self, page: int, spared: int = 0) -> bool:
        """Whether the one table entry that is left, when `spared` others are gone, may write to `page`."""
        return self._holders[page] - spared <= 1 and page not in self._kept

    def choose(self, count: int) -> list[int]:
        """`count` pages to take: freed ones, then new ones, then cached ones.  CacheError naming the bytes needed, with
        nothing changed, when there are not as many."""
        if count > self.left:
            self.recount()
        if count > self.left:
            self.room(count - self.left)
        if count > self.left:
            raise CacheError(
                f"pages: {count} pages ({count * self.page_bytes} bytes) are needed, {self.left} of {self.limit} "
                f"are free; {self.mend}"
            )
        top = len(self._holders)
        reused = self._free[max(0, len(self._free) - count) :]
        fresh = list(range(top, top + min(count - len(reused), self.limit + 1 - top)))
        missing = count - len(reused) - len(fresh)
        evicted = list(self.eviction.pages(self.cached, missing)) if missing else []
        if len(evicted) != missing or len(set(evicted)) != missing or not self._cached.keys() >= set(evicted):
            raise CacheError(
                f"eviction: pages() gave {evicted[:8]} where {missing} different ones of {len(self._cached)} cached "
                f"pages were asked for; return as many of those given"
            )
        return reused + fresh + evicted

    def hold(self, pages: Iterable[int]) -> None:
        """Take what `choose` gave: each page is held once."""
        taken, top = list(pages), len(self._holders)
        reused = sum(page < top and page not in self._cached for page in taken)
        del self._free[len(self._free) - reused :]
        self._holders += [0] * (max(taken, default=0) + 1 - top)
        for page in taken:
            self._holders[page] = 1
            if page in self._cached:
                del self._cached[page]
                self._kept.discard(page)
                self.forgotten(page)

    def share(self, pages: Iterable[int], times: int = 1) -> None:
        """Hold pages `times` more, cached ones among them; the zero page is not counted."""
        for page in pages:
            if page != ZERO and times:
                self._holders[page] += times
                self._cached.pop(page, None)

    def release(self, pages: Iterable[int]) -> None:
        """Give pages back; a page that nobody holds is cached or free."""
        for page in pages:
            if page != ZERO:
                self._holders[page] -= 1
                if not self._holders[page]:
                    self._rest(page)

    def keep(self, page: int) -> None:
        """What a held page holds can be found again: nobody writes to it any more, and without holders it is cached."""
        self._kept.add(page)

    def drop(self, page: int) -> None:
        """What a page holds can be found no more."""
        self._kept.discard(page)
        if page in self._cached:
            del self._cached[page]
            self._free.append(page)

    def recount(self) -> None:
        """Count again from what the living owners hold."""
        holders = [1] + [0] * (len(self._holders) - 1)
        for owner in list(self.owners):
            for page in owner.held():
                holders[page] += page != ZERO
        before, self._holders, self._cached = self._cached, holders, {}
        unheld = [page for page in range(len(holders) - 1, 0, -1) if not holders[page]]
        self._free = [page for page in unheld if page not in self._kept]
        for page in [*before, *unheld]:
            if page in self._kept and not holders[page]:
                self._cached[page] = None

    def _rest(self, page: int) -> None:
        if page in self._kept:
            self._cached[page] = None
        else:
            self._free.append(page)
