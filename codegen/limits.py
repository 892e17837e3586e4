"""The limit that memory sets: the rate at which kernels that only read do so, for many bytes and for as few as a call
reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvdsl.timing import Clock, timed

MOST = 4 << 30  # bytes
WORDS, WARPS = 4096, 4  # of a program of the reading kernel: eight loads of 16 bytes a lane at a time
ROUNDS = (1, 4, 16)  # blocks of a program: few programs start fast, many end together
WORD = 4


class ReadLimit:
    """Bytes of one call, or None for as many as are worthwhile -> bytes a second: the best of all readers."""

    def __init__(self, device: torch.device, clock: Clock) -> None:
        self.device, self.clock = device, clock
        self._known = dict[int | None, float]()

    def __call__(self, nbytes: int | None = None) -> float:
        if nbytes not in self._known:
            self._known[nbytes] = self._measured(nbytes)
        return self._known[nbytes]

    def _measured(self, nbytes: int | None) -> float:
        most = min(MOST, torch.cuda.mem_get_info(self.device)[0] // 2)
        count = min(most, nbytes or most) // WORD
        words = torch.empty(max(WORDS, count), dtype=torch.int32, device=self.device).random_()
        return max(WORD * size / timed(call, self.clock).median for size, call in readers(words))


def readers(words: Tensor) -> list[tuple[int, Callable[[], Any]]]:
    """(how many words it reads, the reader): two reductions of torch, and a kernel of our own in several grids."""
    found: list[tuple[int, Callable[[], Any]]] = [
        (len(words), lambda: words.sum(dtype=torch.int32)),
        (len(words), lambda: words.amax()),
    ]
    return found + [_own(words, rounds) for rounds in ROUNDS if len(words) >= rounds * WORDS]


def _own(words: Tensor, rounds: int) -> tuple[int, Callable[[], Any]]:
    from .device_read import read_words

    programs = len(words) // (rounds * WORDS)
    out = torch.empty(programs, dtype=torch.int32, device=words.device)
    return programs * rounds * WORDS, lambda: read_words[(programs,)](words, out, rounds, WORDS, num_warps=WARPS)
