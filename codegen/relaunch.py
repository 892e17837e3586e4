"""Launching what is compiled, past Triton's own dispatch.

At every launch Triton asks each argument for its type and for what it compiles another kernel for, in about as long as
a short kernel runs: of a step that appends and attends it was a third of the host's time.  Types of a generated
kernel's arguments are those of its signature, so what can differ from launch to launch is little.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from triton.runtime import driver

ALIGNED = 16  # pointers and numbers that are multiples of it have kernels of their own
LARGEST = 2**31 - 1  # larger numbers are of another type


class Compiled:
    """What Triton compiled of one kernel under one setting, by all that it tells launches apart by.

    `again` makes what is launched of what Triton compiled.
    """

    def __init__(self, names: Iterable[str], again: Callable[[Any], Any]) -> None:
        self.names = tuple((name, name.isupper()) for name in names)
        self.again = again
        self._found: dict[tuple[object, ...], Any] = {}

    def launch(self, grid: tuple[int, ...], values: Mapping[str, Any], dispatched: Callable[[], Any]) -> None:
        """Run the kernel with these arguments; `dispatched` does it the first time, and gives what Triton compiled."""
        device = driver.active.get_current_device()
        key: list[object] = [device]
        given: list[Any] = []
        for name, constant in self.names:
            value = values[name]
            if isinstance(value, Tensor):
                key.append(value.dtype)
                value = value.data_ptr()
                key.append(value % ALIGNED == 0)
            elif constant or value is None:
                key.append(value)
            elif isinstance(value, float):
                key.append(float)
            else:
                key.append("1" if value == 1 else (value % ALIGNED == 0, value > LARGEST))
            given.append(value)
        told = tuple(key)
        if told not in self._found:
            first = dispatched()
            self._found[told] = self.again(first)
            if self._found[told] is first:
                return
        whole = *grid, *(1,) * (3 - len(grid))
        self._found[told][whole](*given, stream=driver.active.get_current_stream(device))
