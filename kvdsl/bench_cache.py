"""Caches filled with normal numbers, as `kvdsl bench` times them: with tiers and without."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .api import calibrate
from .cost import bits
from .exact import Tokens
from .fisher import of_outputs, weighted
from .kernels import AttentionState, KernelSet, Params, Side
from .params import ROPE
from .quantized_cache import QuantizedCache
from .rope import usual
from .scheme import SIDES, Scheme
from .segments import segments
from .shape import Shape
from .tier_contents import EXACT, held
from .tier_kernels import TierKernels
from .tiered_cache import Step, TieredCache

Numbers = Callable[[int, int], Tensor]
"""Heads, tokens -> standard normal numbers (batch, heads, tokens, head_dim)."""
Kernels = KernelSet | TierKernels
CHUNK = 4096  # tokens appended, or decoded, at a time
RAGGED = 64  # sequences with tiers are up to so many tokens shorter than asked for
HOT = 4 << 20  # bytes of pages that stay in the L2 cache of every GPU
ENTRY_BYTES = 4  # of a page's number in the table


class Filled(Protocol):
    """A cache, and what is timed over it: one query a sequence, (B, Hq, 1, D)."""

    tokens: int
    """Of all sequences together."""
    read_bytes: int
    """Packed codes and metadata, exact rows and page numbers that one query must read once."""
    paged: bool
    """Whether there is a full page, which `attend_hot` needs."""

    def attend(self, query: Tensor) -> Tensor:
        """All kernels of one step's attention."""
        ...

    def attend_hot(self, query: Tensor) -> Tensor:
        """The same kernels, with page numbers that name few pages: what they read comes from the L2 cache."""
        ...

    def attend_unpacked(self, query: Tensor) -> Tensor:
        """What users do without such kernels: decode the packed tokens, then attend to them."""
        ...

    def decoded(self, which: Sequence[int]) -> Iterator[Iterator[Tokens]]:
        """Of each of these sequences what the cache holds, in pieces; the cache may hold no others afterwards."""
        ...


def filled(kernels: Kernels, batch: int, tokens: int, normal: Numbers) -> Filled:
    """A cache in which every sequence has up to a page less than `tokens`."""
    device = normal(1, 1).device
    params = _params(kernels.scheme, kernels.shape, normal)
    if isinstance(kernels, TierKernels):
        return FilledTiers(_with_tiers(kernels, batch, tokens, normal, params, device))
    return FilledPages(_without_tiers(kernels, batch, tokens, normal, params, device))


class FilledPages:
    """A `QuantizedCache`."""

    def __init__(self, cache: QuantizedCache) -> None:
        self.cache, self._state = cache, cache.state()
        self._hot, self.paged = _hot(self._state, cache), full_pages(cache) > 0
        self.tokens, self.read_bytes = sum(cache.lengths), read_bytes(cache)

    def attend(self, query: Tensor) -> Tensor:
        return self.cache.attend(query, self._state)[0]

    def attend_hot(self, query: Tensor) -> Tensor:
        return self.cache.attend(query, self._hot)[0]

    def attend_unpacked(self, query: Tensor) -> Tensor:
        cache, state = self.cache, self._state
        count = min(min(cache.packed(side)) for side in SIDES)
        keys, values = (
            cache.kernels.unpack(side, state.pool, state.table, 0, count, cache.params).to(query.dtype)
            for side in SIDES
        )
        return scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    def decoded(self, which: Sequence[int]) -> Iterator[Iterator[Tokens]]:
        for b in which:
            yield self._of(b)

    def _of(self, b: int) -> Iterator[Tokens]:
        scheme, length = self.cache.kernels.scheme, self.cache.lengths[b]
        sinks = min(length, scheme.sinks.tokens if scheme.sinks else 0)
        if sinks:
            keys, values = (self.cache.rows(side)[b, :, :sinks] for side in SIDES)
            yield Tokens(keys, values)
        for begin in range(0, length - sinks, CHUNK):
            end = min(begin + CHUNK, length - sinks)
            keys, values = (self._numbers(side, b, sinks, begin, end) for side in SIDES)
            yield Tokens(keys, values)

    def _numbers(self, side: Side, b: int, sinks: int, begin: int, end: int) -> Tensor:
        """Tokens [begin, end) behind the sinks: from pages as far as they are packed, then from the ring of rows."""
        cache, state = self.cache, self._state
        packed, rows = cache.packed(side)[b], cache.rows(side)[b]
        parts = list[Tensor]()
        if begin < packed:
            table = state.table[b : b + 1].contiguous()
            till = min(end, packed)
            parts.append(cache.kernels.unpack(side, state.pool, table, begin, till, cache.params)[0])
        if end > packed:
            u = torch.arange(max(begin, packed), end, device=rows.device)
            parts.append(rows[:, sinks + (u - int(state.first[b])) % (rows.shape[1] - sinks)].float())
        return torch.cat(parts, 1)


class FilledTiers:
    """A `TieredCache`."""

    def __init__(self, cache: TieredCache) -> None:
        self.cache, self._step = cache, cache.state()
        self._kept = [one for one in cache.tiers if one is not None]
        exact, *others = self._step.reads
        hot = [r._replace(state=_hot(r.state, t.cache)) for r, t in zip(others, self._kept, strict=True)]
        self._hot, self.paged = Step((exact, *hot)), any(full_pages(one.cache) for one in self._kept)
        rows = cache.front.keys
        numbers = sum(cache.front.held) * rows.shape[1] * rows.shape[3]
        self.tokens = sum(cache.lengths)
        self.read_bytes = sum(read_bytes(one.cache) for one in self._kept)
        self.read_bytes += len(SIDES) * numbers * rows.element_size()

    def attend(self, query: Tensor) -> Tensor:
        return self.cache.attend(query, self._step)[0]

    def attend_hot(self, query: Tensor) -> Tensor:
        return self.cache.attend(query, self._hot)[0]

    def attend_unpacked(self, query: Tensor) -> Tensor:
        keys, values = (torch.cat(self._unpacked(side, query.dtype), 2) for side in SIDES)
        return scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    def _unpacked(self, side: Side, dtype: torch.dtype) -> list[Tensor]:
        """The exact tokens that all sequences have, then the packed ones of each tier, decoded: in no order."""
        parts = [self.cache.front.rows(side)[:, :, : min(self.cache.front.held)]]
        for read, one in zip(self._step.reads[1:], self._kept, strict=True):
            cache, state, affine = one.cache, read.state, one.beside.affine.get(side)
            count = min(min(cache.packed(other)) for other in SIDES)
            found = cache.kernels.unpack(side, state.pool, state.table, 0, count, cache.params, state.places)
            parts.append((found if affine is None else affine.given_back(found)).to(dtype))
        return parts

    def decoded(self, which: Sequence[int]) -> Iterator[Iterator[Tokens]]:
        self.cache.reorder(list(which))
        (keys, tier_of), (values, _) = (held(self.cache, side, torch.float32) for side in SIDES)
        there = tier_of == EXACT
        for number, one in enumerate(self.cache.tiers):
            there |= (tier_of == number) & (one is not None)
        for b in range(len(which)):
            yield (
                Tokens(keys[b, :, t : t + CHUNK], values[b, :, t : t + CHUNK], there[b, :, t : t + CHUNK])
                for t in range(0, keys.shape[2], CHUNK)
            )


def full_pages(cache: QuantizedCache) -> int:
    """Pages of sequence 0 in which every token is packed."""
    return min(cache.packed(side)[0] for side in SIDES) // cache.kernels.page_tokens


def _hot(state: AttentionState, cache: QuantizedCache) -> AttentionState:
    """The state with page numbers that name the first few pages of sequence 0 over and over."""
    if not (full := full_pages(cache)):
        return state
    few = max(1, min(full, HOT // cache.kernels.page_bytes))
    batch, width = state.table.shape
    row = state.table[0, :few].repeat(-(-width // few))[:width]
    return replace(state, table=row.expand(batch, -1).contiguous())


def _without_tiers(kernels: KernelSet, batch: int, tokens: int, normal: Numbers, params: Params,
                   device: torch.device) -> QuantizedCache:  # fmt: skip
    page = kernels.page_tokens
    found = QuantizedCache(kernels, batch, device=device, params=params, capacity=tokens + page)
    draw, first = random.Random(0), min(CHUNK, tokens)
    counts = [first - draw.randrange(min(page, first)) for _ in range(batch)]
    found.append(*_pair(kernels.scheme, kernels.shape, normal, first), counts=counts)
    for begin in range(first, tokens, CHUNK):
        found.append(*_pair(kernels.scheme, kernels.shape, normal, min(CHUNK, tokens - begin)))
    return found


def _pair(scheme: Scheme, shape: Shape, normal: Numbers, tokens: int) -> tuple[Tensor, Tensor]:
    """Keys and values; shared values are the keys' own first channels."""
    keys = normal(shape.kv_heads, tokens)
    if scheme.shared:
        return keys, keys[..., : scheme.dim("values", shape.head_dim)].contiguous()
    return keys, normal(shape.kv_heads, tokens)


def _with_tiers(kernels: TierKernels, batch: int, tokens: int, normal: Numbers, params: Params,
                device: torch.device) -> TieredCache:  # fmt: skip
    """A prompt in one step, as routers decide about a prompt: by the attention of normal queries."""
    shape = kernels.shape
    found = TieredCache(kernels, batch, device=device, params=params, capacity=max(1, tokens))
    draw = random.Random(0)
    counts = [tokens - draw.randrange(min(RAGGED, tokens)) for _ in range(batch)]
    step = found.append(normal(shape.kv_heads, tokens), normal(shape.kv_heads, tokens), counts=counts)
    scheme = kernels.scheme
    asks = scheme.router is not None or any(one.asks for one in segments(scheme))
    found.route(normal(shape.kv_heads * shape.group, tokens) if asks else None, step)
    return found


def _params(scheme: Scheme, shape: Shape, normal: Numbers) -> Params:
    """What the scheme takes from data, measured on other numbers of the kind."""
    k, v = (x[:1].cpu() for x in _pair(scheme, shape, normal, 1024))
    q = normal(shape.kv_heads * shape.group, 1024)[:1].cpu()
    coded = [one.scheme for one in segments(scheme)] if scheme.routed else [scheme]
    before = any(one is not None and one.keys.rope is not None for one in coded)
    rope = {ROPE: usual(shape.head_dim)} if before else {}
    gradients = of_outputs(q, k, v) if weighted(scheme) else None
    return calibrate(scheme, k, v, q, params=rope, gradients=gradients)


def read_bytes(full: QuantizedCache) -> int:
    """Bytes that one query over the cache must read."""
    kernels, shape = full.kernels, full.kernels.shape
    each = bits(kernels.scheme, shape.head_dim, shape.kv_heads)
    total = sum(-(-length // kernels.page_tokens) * ENTRY_BYTES for length in full.lengths)
    for side, width in zip(SIDES, (each.keys, each.values), strict=True):
        packed = sum(full.packed(side))
        exact = (sum(full.lengths) - packed) * full.rows(side).element_size()
        total += round(packed * shape.kv_heads * shape.head_dim * width / 8)
        total += exact * shape.kv_heads * kernels.dim(side)
    return total
