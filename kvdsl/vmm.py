"""Growing CUDA memory at a fixed address, by the driver's virtual memory calls (CUDA driver API, section 6.14).

A range of addresses is reserved once; physical memory is mapped into it as it is used, in whole granules.  This memory
is no part of PyTorch's allocator: it counts in the cache's own figures, not in torch.cuda.memory_allocated().
"""

from __future__ import annotations

import ctypes
import weakref
from ctypes import byref, c_int, c_size_t, c_uint64
from typing import Any

import torch

from .errors import CacheError

OUT_OF_MEMORY = 2
PINNED, ON_DEVICE, READ_WRITE = 1, 1, 3


class _Location(ctypes.Structure):
    _fields_ = [("kind", c_int), ("id", c_int)]


class _Properties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = [
        ("kind", c_int),
        ("handle_kinds", c_int),
        ("location", _Location),
        ("win32", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    ]


class _Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = [("location", _Location), ("flags", c_int)]


class Mapped:
    """`size` reserved bytes from `address` on, the first `committed` of them backed by memory of one device.

    A tensor made of it (torch.as_tensor) keeps it alive; with the last such tensor the memory goes back, after the
    device has finished.
    """

    def __init__(self, driver: Any, address: int, size: int, granule: int, device: torch.device) -> None:
        self._driver, self._granule, self.device = driver, granule, device
        self.address, self.size, self.committed = address, size, 0
        self._pieces: list[tuple[int, int, int]] = []
        self._properties = _properties(device)
        self._access = _Access(self._properties.location, READ_WRITE)
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 2}
        weakref.finalize(self, _give_back, driver, address, size, self._pieces, device)

    @classmethod
    def reserve(cls, size: int, device: torch.device) -> Mapped | None:
        """A range for at least `size` bytes, or None where the driver has no such calls (or refuses them)."""
        if torch.version.cuda is None:
            return None
        try:
            driver = ctypes.CDLL("libcuda.so.1")
            query, reserve = driver.cuMemGetAllocationGranularity, driver.cuMemAddressReserve
        except (OSError, AttributeError):
            return None
        with torch.cuda.device(device):
            torch.zeros(1, device=device)  # The driver calls need the context that PyTorch makes at its first use.
            granule, address = c_size_t(), c_uint64()
            if query(byref(granule), byref(_properties(device)), 0):
                return None
            size = -(-size // granule.value) * granule.value
            if reserve(byref(address), c_size_t(size), c_size_t(0), c_uint64(0), c_uint64(0)):
                return None
        return cls(driver, address.value, size, granule.value, device)

    def commit(self, size: int) -> None:
        """Back the first `size` bytes.  CacheError, with nothing changed, when the device has no memory left."""
        more = -(-size // self._granule) * self._granule - self.committed
        if more <= 0:
            return
        driver, handle, step = self._driver, c_uint64(), c_size_t(more)
        place = c_uint64(self.address + self.committed)
        with torch.cuda.device(self.device):
            status = driver.cuMemCreate(byref(handle), step, byref(self._properties), c_uint64(0))
            if status == OUT_OF_MEMORY:
                torch.cuda.empty_cache()
                status = driver.cuMemCreate(byref(handle), step, byref(self._properties), c_uint64(0))
            if status:
                raise CacheError(
                    f"pages: {more} more bytes cannot be had on {self.device} (driver status {status}); "
                    f"crop or reset caches, or free memory"
                )
            status = driver.cuMemMap(place, step, c_size_t(0), handle, c_uint64(0))
            if not status:
                status = driver.cuMemSetAccess(place, step, byref(self._access), c_size_t(1))
                if status:
                    driver.cuMemUnmap(place, step)
            if status:
                driver.cuMemRelease(handle)
                raise CacheError(f"pages: memory cannot be mapped on {self.device} (driver status {status})")
        self._pieces.append((place.value, more, handle.value))
        self.committed += more


def _properties(device: torch.device) -> _Properties:
    index = torch.cuda.current_device() if device.index is None else device.index
    return _Properties(kind=PINNED, location=_Location(ON_DEVICE, index))


def _give_back(driver: Any, address: int, size: int, pieces: list[tuple[int, int, int]], device: torch.device) -> None:
    with torch.cuda.device(device):
        torch.cuda.synchronize(device)
        for place, length, handle in pieces:
            driver.cuMemUnmap(c_uint64(place), c_size_t(length))
            driver.cuMemRelease(c_uint64(handle))
        driver.cuMemAddressFree(c_uint64(address), c_size_t(size))
