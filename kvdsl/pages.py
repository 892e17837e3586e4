"""The pages of one layer's cache: who holds which and how often, and the tables by which sequences find them."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakSet

import torch
from torch import Tensor

from .errors import CacheError
from .reserve import Reservation

ZERO = 0
"""The page that no sequence owns: all bytes are zero.  Table entries that hold nothing point to it."""


class Owner(Protocol):
    """Whoever holds pages: names each one as often as it holds it."""

    def held(self) -> Iterable[int]: ...

    def __hash__(self) -> int: ...


def upload(
    values: Sequence[int] | Sequence[Sequence[int]], device: torch.device, dtype: torch.dtype = torch.int32
) -> Tensor:
    """Host integers as a device tensor, without waiting for the device."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, device="cpu", pin_memory=True).to(device, non_blocking=True)


class PagePool:
    """`limit` pages of `page_bytes` bytes in one tensor `bytes` (1 + limit, page_bytes) uint8; page 0 is the zero page.

    Growing never moves or copies a page: the address space is reserved once and backed as it is used (see reserve.py).
    Counts of holders are kept on the host.  The owners' committed tables are the truth; `recount` restores the counts
    from them, after a failure and when an owner was dropped without giving its pages back.
    """

    def __init__(self, limit: int, page_bytes: int, device: torch.device) -> None:
        self.limit, self.page_bytes, self.device = limit, page_bytes, device
        self._space = Reservation((1 + limit) * page_bytes, device)
        self._space.commit(page_bytes)
        self.bytes = self._space.tensor.view(1 + limit, page_bytes)
        self.bytes[ZERO].zero_()
        self.owners: WeakSet[Owner] = WeakSet()
        self.lock = threading.Lock()
        self.copies = 0
        self._holders = [1]
        self._free: list[int] = []

    @property
    def in_use(self) -> int:
        """Pages that somebody holds, without the zero page."""
        return len(self._holders) - 1 - len(self._free)

    @property
    def committed(self) -> int:
        """Bytes of memory that back the pool: whole granules of the system on CUDA, the pages ever used elsewhere."""
        return self._space.committed

    def holders(self, page: int) -> int:
        """How many table entries point to `page`."""
        return self._holders[page]

    def take(self, count: int) -> list[int]:
        """`count` pages of zeros, each held once.  CacheError naming the bytes needed, with nothing changed, when
        full."""
        if count > self._left():
            self.recount()
        if count > self._left():
            raise CacheError(
                f"pages: {count} pages ({count * self.page_bytes} bytes) are needed, {self._left()} of {self.limit} "
                f"are free; build the cache with a capacity= of more tokens, crop or reset it"
            )
        top = len(self._holders)
        fresh = max(0, count - len(self._free))
        self._space.commit((top + fresh) * self.page_bytes)
        reused = self._free[len(self._free) - (count - fresh) :]
        if reused:
            self.bytes.index_fill_(0, upload(reused, self.device, torch.int64), 0)
        if fresh:
            self.bytes[top : top + fresh].zero_()
        self._holders += [1] * fresh
        for page in reused:
            self._holders[page] = 1
        del self._free[len(self._free) - len(reused) :]
        return reused + list(range(top, top + fresh))

    def copy(self, source: int, target: int) -> None:
        """Overwrite one page with another."""
        self.bytes[target].copy_(self.bytes[source])
        self.copies += 1

    def share(self, pages: Iterable[int], times: int = 1) -> None:
        """Hold pages `times` more; the zero page is not counted."""
        for page in pages:
            if page != ZERO:
                self._holders[page] += times

    def release(self, pages: Iterable[int]) -> None:
        """Give pages back; a page that nobody holds is free."""
        for page in pages:
            if page != ZERO:
                self._holders[page] -= 1
                if not self._holders[page]:
                    self._free.append(page)

    def recount(self) -> None:
        """Count again from what the living owners hold."""
        holders = [1] + [0] * (len(self._holders) - 1)
        for owner in list(self.owners):
            for page in owner.held():
                holders[page] += page != ZERO
        self._holders = holders
        self._free = [page for page in range(len(holders) - 1, 0, -1) if not holders[page]]

    def _left(self) -> int:
        return self.limit - self.in_use


@dataclass(frozen=True)
class PageTable:
    """The pages of every sequence in order: `ids` on the host (ZERO: none), `tensor` int32 (B, width) on the device.

    The tensor has at least one entry of padding behind the longest sequence.  A table never changes: each method gives
    a new one, and the pages that the old one alone holds are for the caller to release once the new one is in force.
    """

    ids: tuple[tuple[int, ...], ...]
    tensor: Tensor

    @classmethod
    def of(cls, ids: Sequence[Sequence[int]], device: torch.device) -> PageTable:
        """The table of given pages."""
        width = max(map(len, ids), default=0) + 1
        rows = [list(row) + [ZERO] * (width - len(row)) for row in ids]
        return cls(tuple(map(tuple, ids)), upload(rows, device).view(len(rows), width))

    def claim(
        self, pool: PagePool, touched: Sequence[Iterable[int]], gone: Sequence[int]
    ) -> tuple[PageTable, list[int]]:
        """Make the touched places of each sequence its own, and let go of those before gone_b: (table, pages to
        release).

        A place without a page gets a page of zeros, a page that others hold too a copy.
        """
        missing: list[tuple[int, int]] = []
        entries: list[tuple[int, int, int]] = []
        dropped: list[int] = []
        spared: Counter[int] = Counter()
        changed: dict[int, list[int]] = {}
        for b, (ids, places, passed) in enumerate(zip(self.ids, touched, gone, strict=True)):
            places = list(places)
            if not places and not any(ids[:passed]):
                continue
            row = changed[b] = list(ids) + [ZERO] * (max(places, default=-1) + 1 - len(ids))
            for j in range(min(passed, len(ids))):
                if row[j] != ZERO:
                    dropped.append(row[j])
                    entries.append((b, j, ZERO))
                    row[j] = ZERO
            for j in places:
                shared = row[j] != ZERO and pool.holders(row[j]) - spared[row[j]] > 1
                if shared:
                    spared[row[j]] += 1
                if shared or row[j] == ZERO:
                    missing.append((b, j))
        for (b, j), page in zip(missing, pool.take(len(missing)), strict=True):
            if changed[b][j] != ZERO:
                pool.copy(changed[b][j], page)
                dropped.append(changed[b][j])
            changed[b][j] = page
            entries.append((b, j, page))
        if not entries:
            return self, dropped
        after = tuple(tuple(changed.get(b, ids)) for b, ids in enumerate(self.ids))
        return PageTable(after, self._with(entries, max(map(len, after)) + 1)), dropped

    def truncate(self, counts: Sequence[int]) -> tuple[PageTable, list[int]]:
        """The first counts_b places of each sequence, and the pages behind them."""
        dropped = [page for row, count in zip(self.ids, counts, strict=True) for page in row[count:]]
        ids = tuple(row[:count] for row, count in zip(self.ids, counts, strict=True))
        return (PageTable.of(ids, self.tensor.device) if dropped else self), dropped

    def select(self, index: Sequence[int]) -> PageTable:
        """The tables of chosen sequences, in that order."""
        places = upload(index, self.tensor.device, torch.int64)
        return PageTable(tuple(self.ids[i] for i in index), self.tensor.index_select(0, places))

    def _with(self, entries: Sequence[tuple[int, int, int]], width: int) -> Tensor:
        if width > self.tensor.shape[1]:
            tensor = self.tensor.new_zeros(self.tensor.shape[0], 2 * width)
            tensor[:, : self.tensor.shape[1]] = self.tensor
        else:
            tensor = self.tensor.clone()
        b, j, page = upload(entries, tensor.device, torch.int64).unbind(1)
        tensor[b, j] = page.to(torch.int32)
        return tensor
