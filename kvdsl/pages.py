"""The pages of one layer's cache: their bytes, and the tables by which sequences find them."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .allocator import ZERO, Allocator
from .reserve import Reservation

__all__ = ["ZERO", "PagePool", "PageTable", "upload"]


def upload(
    values: Sequence[int] | Sequence[Sequence[int]], device: torch.device, dtype: torch.dtype = torch.int32
) -> Tensor:
    """Host integers as a device tensor, without waiting for the device."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, device="cpu", pin_memory=True).to(device, non_blocking=True)


class PagePool(Allocator):
    """`limit` pages of `page_bytes` bytes in one tensor `bytes` (1 + limit, page_bytes) uint8; page 0 is the zero page.

    Growing never moves or copies a page: the address space is reserved once and backed as it is used (see reserve.py).
    """

    def __init__(self, limit: int, page_bytes: int, device: torch.device) -> None:
        super().__init__(limit, page_bytes)
        self.device = device
        self._space = Reservation((1 + limit) * page_bytes, device)
        self._space.commit(page_bytes)
        self.bytes = self._space.tensor.view(1 + limit, page_bytes)
        self.bytes[ZERO].zero_()
        self.lock = threading.Lock()
        self.copies = 0

    @property
    def committed(self) -> int:
        """Bytes of memory that back the pool: whole granules of the system on CUDA, the pages ever used elsewhere."""
        return self._space.committed

    def take(self, count: int) -> list[int]:
        """`count` pages of zeros, each held once.  CacheError naming the bytes needed, with nothing changed, when
        full."""
        pages, top = self.choose(count), len(self._holders)
        self._space.commit((max(pages, default=0) + 1) * self.page_bytes)
        self.hold(pages)  # first, as a cached page whose bytes are gone must not be found again
        used = [page for page in pages if page < top]
        if used:
            self.bytes.index_fill_(0, upload(used, self.device, torch.int64), 0)
        if len(used) < count:
            self.bytes[top : top + count - len(used)].zero_()
        return pages

    def copy(self, source: int, target: int) -> None:
        """Overwrite one page with another."""
        self.bytes[target].copy_(self.bytes[source])
        self.copies += 1


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
                shared = row[j] != ZERO and not pool.owned(row[j], spared[row[j]])
                if shared:
                    spared[row[j]] += 1
                if shared or row[j] == ZERO:
                    missing.append((b, j))
        if not missing and not entries:
            return self, dropped
        for (b, j), page in zip(missing, pool.take(len(missing)), strict=True):
            if changed[b][j] != ZERO:
                pool.copy(changed[b][j], page)
                dropped.append(changed[b][j])
            changed[b][j] = page
            entries.append((b, j, page))
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
