"""How fast decode attention reads a filled cache, beside attention over float16 numbers and the memory's own limit.

What is timed is what a step of generation runs: all kernels of one call over the pages and exact rows of a
`QuantizedCache`, with lengths that differ from sequence to sequence.  On a GPU a CUDA graph holds the call, the L2
cache is emptied by reading before every sample, and the median counts.  On a CPU only ratios mean anything.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .api import calibrate
from .cost import bits
from .errors import ShapeError
from .fisher import of_outputs, weighted
from .kernels import AttentionState, KernelSet, Params
from .params import ROPE
from .quantized_cache import QuantizedCache
from .rope import usual
from .scheme import SIDES
from .shape import Shape

Numbers = Callable[[int, int], Tensor]
"""Heads, tokens -> standard normal numbers (batch, heads, tokens, head_dim)."""
CHUNK = 4096  # tokens appended at a time
FLUSH = 256 << 20  # bytes read to empty the L2 cache
LIMIT = 4 << 30  # bytes read to find the limit
EXACT_BYTES = 2  # of a number of an exact row
ENTRY_BYTES = 4  # of a page's number in the table


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

    def __str__(self) -> str:
        return f"{self.batch}x{self.kv_heads}x{self.tokens}"


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


@dataclass(frozen=True)
class Measured:
    """One call over one cache, and what it stands beside.

    read_bytes    packed codes and metadata, exact rows and page numbers that the call must read once
    ours          the call
    fp16          attention over float16 keys and values of `tokens` tokens in every sequence
    unpacked      decoding the whole cache to float16 and that; None where memory does not hold it
    """

    read_bytes: int
    ours: Times
    fp16: Times
    unpacked: Times | None


def timed(call: Callable[[], object], device: torch.device, samples: int = 21) -> Times:
    """Median and spread of a call that leaves nothing behind: on a GPU replays of its CUDA graph, cold."""
    if device.type != "cuda":
        call()
        return Times(tuple(_clocked(call) for _ in range(5)))
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    found = []
    for _ in range(samples + 2):
        _flush(device).sum(dtype=torch.int32)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end) / 1e3)
    return Times(tuple(found[2:]))


def _clocked(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


@cache
def _flush(device: torch.device) -> Tensor:
    return torch.randint(0, 100, (FLUSH // 4,), dtype=torch.int32, device=device)


def read_limit(device: torch.device) -> float:
    """Bytes a second at which the device reads: the best of two reductions of many bytes."""
    free = torch.cuda.mem_get_info(device)[0]
    x = torch.empty(min(LIMIT, free // 2) // 4, dtype=torch.int32, device=device).random_()
    reductions: tuple[Callable[[], object], ...] = (lambda: x.sum(dtype=torch.int32), lambda: x.amax())
    return max(4 * x.numel() / timed(one, device).median for one in reductions)


def measured(kernels: KernelSet, size: Size, device: torch.device) -> Measured:
    """Fill a cache with normal numbers and time one query a sequence over it."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(heads: int, tokens: int) -> Tensor:
        numbers = torch.empty(size.batch, heads, tokens, size.head_dim, dtype=torch.float16, device=device)
        return numbers.normal_(generator=generator)

    query = normal(size.q_heads, 1)
    total, ours, unpacked = _of_a_cache(kernels, size, query, normal)
    keys, values = (normal(size.kv_heads, size.tokens) for _ in SIDES)
    fp16 = timed(lambda: scaled_dot_product_attention(query, keys, values, enable_gqa=True), device)
    return Measured(total, ours, fp16, unpacked)


def _of_a_cache(kernels: KernelSet, size: Size, query: Tensor, normal: Numbers) -> tuple[int, Times, Times | None]:
    """The first three of `Measured`; the cache's memory is free again afterwards."""
    full = _filled(kernels, size, query.device, normal)
    state = full.state()
    ours = timed(lambda: full.attend(query, state), query.device)
    fits = _fits(size, query.device)
    unpacked = timed(lambda: _dense(full, query, state), query.device) if fits else None
    return read_bytes(full), ours, unpacked


def _filled(kernels: KernelSet, size: Size, device: torch.device, normal: Numbers) -> QuantizedCache:
    """A cache in which every sequence has up to a page less than `size.tokens`."""
    found = QuantizedCache(
        kernels, size.batch, device=device, params=_params(kernels, normal), capacity=size.tokens + kernels.page_tokens
    )
    draw = random.Random(0)
    first = min(CHUNK, size.tokens)
    counts = [first - draw.randrange(min(kernels.page_tokens, first)) for _ in range(size.batch)]
    found.append(normal(size.kv_heads, first), normal(size.kv_heads, first), counts=counts)
    for begin in range(first, size.tokens, CHUNK):
        chunk = min(CHUNK, size.tokens - begin)
        found.append(normal(size.kv_heads, chunk), normal(size.kv_heads, chunk))
    return found


def _params(kernels: KernelSet, normal: Numbers) -> Params:
    """What the scheme takes from data, measured on other numbers of the kind."""
    heads = kernels.shape.kv_heads
    k, v, q = (normal(n, 1024)[:1].cpu() for n in (heads, heads, heads * kernels.shape.group))
    rope = {ROPE: usual(kernels.shape.head_dim)} if kernels.scheme.keys.rope is not None else {}
    gradients = of_outputs(q, k, v) if weighted(kernels.scheme) else None
    return calibrate(kernels.scheme, k, v, q, params=rope, gradients=gradients)


def read_bytes(full: QuantizedCache) -> int:
    """Bytes that one query over the cache must read."""
    kernels, each = full.kernels, bits(full.kernels.scheme, full.kernels.shape.head_dim)
    numbers = kernels.shape.kv_heads * kernels.shape.head_dim
    total = sum(-(-length // kernels.page_tokens) * ENTRY_BYTES for length in full.lengths)
    for side, width in zip(SIDES, (each.keys, each.values), strict=True):
        packed = sum(full.packed(side))
        total += round(packed * numbers * width / 8) + (sum(full.lengths) - packed) * numbers * EXACT_BYTES
    return total


def _fits(size: Size, device: torch.device) -> bool:
    """Whether the decoded cache fits beside itself: float32 of a side, both sides as float16, and a copy."""
    if device.type != "cuda":
        return True
    numbers = size.batch * size.kv_heads * size.tokens * size.head_dim
    return 4 * numbers + 3 * EXACT_BYTES * numbers < torch.cuda.mem_get_info(device)[0] * 0.8


def _dense(full: QuantizedCache, query: Tensor, state: AttentionState) -> Tensor:
    """What users do without such kernels: decode the packed tokens, then attend to them."""
    count = min(min(full.packed(side)) for side in SIDES)
    keys, values = (
        full.kernels.unpack(side, state.pool, state.table, 0, count, full.params).to(query.dtype) for side in SIDES
    )
    return scaled_dot_product_attention(query, keys, values, enable_gqa=True)


def result(name: str, size: Size, found: Measured, limit: float | None) -> dict[str, object]:
    """One row of `kvdsl bench`: microseconds, GB/s and share of the limit (on a GPU alone), and times over others."""
    ours, gpu = found.ours.median, limit is not None
    return {
        "scheme": name,
        "kernel": "decode",
        "shape": str(size),
        "group": size.group,
        "head_dim": size.head_dim,
        "bytes": found.read_bytes,
        "us": ours * 1e6 if gpu else None,
        "us_p10": found.ours.at(0.1) * 1e6 if gpu else None,
        "us_p90": found.ours.at(0.9) * 1e6 if gpu else None,
        "us_fp16": found.fp16.median * 1e6 if gpu else None,
        "gbps": found.read_bytes / ours / 1e9 if gpu else None,
        "share": found.read_bytes / ours / limit if limit is not None else None,
        "speedup_fp16": found.fp16.median / ours,
        "speedup_unpack": found.unpacked.median / ours if found.unpacked else None,
    }
