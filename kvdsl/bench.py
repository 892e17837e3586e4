"""How fast decode attention reads a filled cache, beside attention over float16 numbers and the memory's own limit.

What is timed is what a step of generation runs: all kernels of one call over the pages and exact rows of a cache, with
lengths that differ from sequence to sequence.  On a GPU a CUDA graph holds the call, the L2 cache is emptied by reading
before every sample, and the median counts.  On a CPU only ratios mean anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .bench_cache import Filled, Kernels, Numbers, filled, read_bytes
from .errors import ShapeError
from .exact import attended, relative_error
from .shape import Shape
from .timing import Clock, Times, timed

__all__ = ["Measured", "Size", "Times", "measured", "numbers", "read_bytes", "result"]

FLOAT16 = 2  # bytes
CHECKED = 2  # sequences that are compared with float64
Limit = Callable[[int | None], float]
"""Bytes of one call, or None for many -> bytes a second at which the device reads so many."""


@dataclass(frozen=True)
class Size:
    """`batch` sequences of about `tokens` tokens, `kv_heads` heads of `head_dim` channels, `group` queries a head."""

    batch: int
    kv_heads: int
    tokens: int
    group: int = 4
    head_dim: int = 128

    @classmethod
    def parse(cls, text: str, group: int = 4, head_dim: int = 128) -> Size:
        """BATCHxHEADSxTOKENS.  Raises ShapeError."""
        parts = text.lower().split("x")
        if len(parts) != 3 or not all(part.isdecimal() and int(part) > 0 for part in parts):
            raise ShapeError(f"shape: {text!r}; give BATCHxHEADSxTOKENS, such as 8x8x131072")
        batch, heads, tokens = map(int, parts)
        return cls(batch, heads, tokens, group, head_dim)

    @property
    def q_heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def shape(self) -> Shape:
        return Shape(self.head_dim, self.kv_heads, self.q_heads)

    @property
    def numbers(self) -> int:
        """Of the keys and values of all sequences."""
        return 2 * self.batch * self.kv_heads * self.tokens * self.head_dim

    def __str__(self) -> str:
        return f"{self.batch}x{self.kv_heads}x{self.tokens}"


@dataclass(frozen=True)
class Measured:
    """One call over one cache, and what it stands beside.

    read_bytes    packed codes and metadata, exact rows and page numbers that the call must read once
    bits          of them for each number of keys and values
    ours          the call
    hot           the same kernels over few pages, which the L2 cache holds: what instructions allow; None
                  where no page is full
    fp16          attention over float16 keys and values of `tokens` tokens in every sequence
    unpacked      decoding the whole cache to float16 and that; None where memory does not hold it
    error         of the call's output against float64 attention over the same decoded cache, relative
    error_rows    how many rows of the output, one a sequence and query head, were compared
    schedule      where the call's schedule comes from, see KernelSet
    """

    read_bytes: int
    bits: float
    ours: Times
    hot: Times | None
    fp16: Times
    unpacked: Times | None
    error: float
    error_rows: int
    schedule: str


def numbers(size: Size, device: torch.device, seed: int = 0, dtype: torch.dtype = torch.float16) -> Numbers:
    """Standard normal numbers, always the same ones."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(heads: int, tokens: int) -> Tensor:
        found = torch.empty(size.batch, heads, tokens, size.head_dim, dtype=dtype, device=device)
        return found.normal_(generator=generator)

    return normal


def measured(kernels: Kernels, size: Size, device: torch.device, clock: Clock) -> Measured:
    """Fill a cache with normal numbers and time one query a sequence over it."""
    from .peers.sdpa import Sdpa

    normal = numbers(size, device)
    query = normal(size.q_heads, 1)
    ours = _of_a_cache(kernels, size, query, normal, clock)
    fp16 = timed(Sdpa().prepare(size, normal).call, clock)
    return Measured(fp16=fp16, **ours)


def _of_a_cache(kernels: Kernels, size: Size, query: Tensor, normal: Numbers, clock: Clock) -> dict[str, Any]:
    """The fields of `Measured` that are of the cache, whose memory is free again afterwards."""
    full = filled(kernels, size.batch, size.tokens, normal)
    ours = timed(lambda: full.attend(query), clock)
    hot = timed(lambda: full.attend_hot(query), clock, cold=False) if full.paged else None
    fits = _fits(size, query.device)
    unpacked = timed(lambda: full.attend_unpacked(query), clock) if fits else None
    error, rows = _error(full, query)
    width = 8 * full.read_bytes / (2 * full.tokens * size.kv_heads * size.head_dim)
    return dict(
        read_bytes=full.read_bytes,
        bits=width,
        ours=ours,
        hot=hot,
        unpacked=unpacked,
        error=error,
        error_rows=rows,
        schedule=kernels.schedule_for(size.batch, size.tokens),
    )


def _error(full: Filled, query: Tensor) -> tuple[float, int]:
    """(the relative error of the output of the first and the last sequence, how many of its rows that is)."""
    which = sorted({0, query.shape[0] - 1})[:CHECKED]
    out = full.attend(query)[which, :, 0]
    exact = torch.stack(
        [attended(query[b, :, 0], pieces) for b, pieces in zip(which, full.decoded(which), strict=True)]
    )
    return relative_error(out, exact), out.shape[0] * out.shape[1]


def _fits(size: Size, device: torch.device) -> bool:
    """Whether the decoded cache fits beside itself: float32 of a side, both sides as float16, and a copy."""
    if device.type != "cuda":
        return True
    side = size.numbers // 2
    return 4 * side + 3 * FLOAT16 * side < torch.cuda.mem_get_info(device)[0] * 0.8


def result(name: str, size: Size, found: Measured, limit: float | None, own: float | None = None) -> dict[str, object]:
    """One row of `kvdsl bench`: microseconds, GB/s and shares of the limit and of the limit at the call's own bytes
    (on a GPU alone), and times over others; `seconds` are for comparing with peers."""
    ours, gpu = found.ours.median, limit is not None
    micro = {"us": found.ours, "us_fp16": found.fp16, "us_unpack": found.unpacked, "us_hot": found.hot}
    rate = found.read_bytes / ours
    return {
        "scheme": name,
        "kernel": "decode",
        "shape": str(size),
        "group": size.group,
        "head_dim": size.head_dim,
        "bits": found.bits,
        "bytes": found.read_bytes,
        "seconds": ours,
        "us_p10": found.ours.at(0.1) * 1e6 if gpu else None,
        "us_p90": found.ours.at(0.9) * 1e6 if gpu else None,
        **{key: times.median * 1e6 if gpu and times else None for key, times in micro.items()},
        "gbps": rate / 1e9 if gpu else None,
        "gbps_hot": found.read_bytes / found.hot.median / 1e9 if gpu and found.hot else None,
        "limit_gbps": own / 1e9 if own is not None else None,
        "share": rate / limit if limit is not None else None,
        "share_own": rate / own if own is not None else None,
        "speedup_fp16": found.fp16.median / ours,
        "speedup_unpack": found.unpacked.median / ours if found.unpacked else None,
        "error": found.error,
        "error_rows": found.error_rows,
        "schedule": found.schedule,
    }
