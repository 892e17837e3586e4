"""Address space for a page pool: reserved at once, backed by memory only where pages are really used.

A pool that grows must neither move (kernels hold its address) nor copy what it holds.  On the CPU an anonymous mapping
does both: the system backs a page of it when it is first written.  On CUDA the driver's virtual memory calls do: a
range of addresses is reserved, memory is mapped into it a granule (2 MiB) at a time.  Where the driver lacks them, all
of the reservation is allocated at once, so `capacity=` should then be what is needed.
"""

from __future__ import annotations

import mmap
import sys

import torch
from torch import Tensor

from .errors import CacheError


class Reservation:
    """`size` bytes of address space on `device`; `tensor` (size,) uint8 covers them, those before `committed` are
    usable."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.device = device
        self.mapped = None
        self.committed = 0
        if device.type == "cpu":
            self.tensor = _lazy(size)
            return
        if device.type == "cuda":
            from .vmm import Mapped

            self.mapped = Mapped.reserve(size, device)
        if self.mapped is not None:
            self.mapped.commit(1)
            self.tensor = torch.as_tensor(self.mapped, device=device)[:size]
            self.committed = self.mapped.committed
        else:
            try:
                self.tensor = torch.empty(size, dtype=torch.uint8, device=device)
            except torch.OutOfMemoryError as error:
                raise CacheError(
                    f"pages: {size} bytes cannot be allocated on {device}; use a smaller capacity="
                ) from error
            self.committed = size

    def commit(self, size: int) -> None:
        """Make the first `size` bytes usable.  CacheError, with nothing changed, when the memory is not there."""
        if size > self.committed:
            if self.mapped is not None:
                self.mapped.commit(size)
                self.committed = self.mapped.committed
            else:
                self.committed = size


def _lazy(size: int) -> Tensor:
    """Zero bytes that take memory only once they are written."""
    try:
        if sys.platform == "linux":
            # 0x4000 is MAP_NORESERVE, without which the system may refuse a large range.
            space = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
        else:
            space = mmap.mmap(-1, size)
    except (OSError, OverflowError, ValueError) as error:
        raise CacheError(f"pages: {size} bytes of address space cannot be reserved; use a smaller capacity=") from error
    return torch.frombuffer(space, dtype=torch.uint8)
