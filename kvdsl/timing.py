"""How long a call takes: what is timed is named by a clock, so that everything else can be tested with another one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Call = Callable[[], object]
SAMPLES = 21
FLUSH = 256 << 20  # bytes read to empty the L2 cache


@dataclass(frozen=True)
class Times:
    """Seconds of the samples of one call."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def at(self, share: float) -> float:
        """The quantile."""
        return sorted(self.samples)[round(share * (len(self.samples) - 1))]


class Clock(Protocol):
    """What times a call that leaves nothing behind."""

    def seconds(self, call: Call, samples: int, *, cold: bool, graph: bool) -> tuple[float, ...]:
        """That many samples.  `cold`: nothing that the call reads is in a cache before; `graph`: all that it launches
        is launched at once, as a CUDA graph, where there is one."""
        ...


def timed(call: Call, clock: Clock, *, samples: int = SAMPLES, cold: bool = True, graph: bool = True) -> Times:
    """The samples of one call."""
    return Times(clock.seconds(call, samples, cold=cold, graph=graph))


class HostClock:
    """The clock of a CPU: 5 samples behind a first call, as they come."""

    def seconds(self, call: Call, samples: int, *, cold: bool, graph: bool) -> tuple[float, ...]:
        call()
        return tuple(_once(call) for _ in range(min(5, samples)))


def _once(call: Call) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


class DeviceClock:
    """Events of a GPU around replays of the call's CUDA graph; L2 is emptied by reading, as what is written would stay
    there and be in the way."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush: Tensor | None = None

    def seconds(self, call: Call, samples: int, *, cold: bool, graph: bool) -> tuple[float, ...]:
        for _ in range(3):
            call()
        torch.cuda.synchronize(self.device)
        run = _captured(call) if graph else call
        found = []
        for _ in range(samples + 2):
            if cold:
                self._emptied()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize(self.device)
            found.append(begin.elapsed_time(end) / 1e3)
        return tuple(found[2:])

    def _emptied(self) -> None:
        if self._flush is None:
            self._flush = torch.randint(0, 100, (FLUSH // 4,), dtype=torch.int32, device=self.device)
        self._flush.sum(dtype=torch.int32)


def _captured(call: Call) -> Call:
    """The replay of a CUDA graph of the call."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def clock_of(device: torch.device) -> Clock:
    """The clock of a device."""
    return DeviceClock(device) if device.type == "cuda" else HostClock()
