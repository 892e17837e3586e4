"""How far a scheme is off: round trips through packed bytes, scores and attention, over the seeds of what it draws.

The tensors are fixed, 1024 tokens of 2 kv heads with 128 channels, or as many as a scheme says: standard normal
numbers; and keys as real models have them, with an offset in every channel and four outlier channels a head.  Numbers
that a scheme takes from data are measured on as many other tokens of the same kind; tables are weighted by how much
random sums of their attention's outputs care, where a model's loss would be asked.  Where keys are stored before RoPE,
they get rotary positions first, counted from the first of the tokens, so that every scheme codes the same numbers.
Shared values are the keys' own first channels.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TypedDict

import torch
from torch import Generator, Tensor

from .api import attend, calibrate, roundtrip, scores
from .fisher import of_outputs, weighted
from .kernels import Backend
from .params import ROPE, rope_of
from .rope import turned, usual
from .scheme import Rotate, Scheme, Sketch, Store, TopChannels

HEADS, Q_HEADS, TOKENS, QUERIES, CHANNELS = 2, 8, 1024, 32, 128
OUTLIERS = 4  # channels of a head
SIZES = (8.0, 20.0)  # of an outlier channel over the others
FREQUENCIES = usual(CHANNELS)
MEASURES = ("keys_mse", "values_mse", "score_error", "output_error")


class Spread(TypedDict):
    """Of one number over the seeds; `std` is the sample's, 0 over one."""

    mean: float
    std: float


@dataclass(frozen=True)
class Data:
    """What a scheme is tried on: q (1, Hq, Q, D), k and v (1, H, T, D), and other tokens of the kind to measure on."""

    q: Tensor
    k: Tensor
    v: Tensor
    others: tuple[Tensor, Tensor, Tensor]


@cache
def normal_numbers(channels: int = CHANNELS) -> Data:
    """Queries, keys and values of independent standard normal numbers."""
    generator = Generator().manual_seed(0)
    sizes = ((Q_HEADS, QUERIES), (HEADS, TOKENS), (HEADS, TOKENS))
    return _halved(*(torch.randn(1, heads, 2 * rows, channels, generator=generator) for heads, rows in sizes))


def _of(scheme: Scheme, made: Callable[[int], Data]) -> Data:
    """The data as a scheme has it: vectors of its own length, shared values as the keys have them."""
    data = made(scheme.head_dim or CHANNELS)
    if not scheme.shared:
        return data
    dim, (q, k, _) = scheme.dim("values", data.k.shape[3]), data.others
    return replace(data, v=data.k[..., :dim], others=(q, k, k[..., :dim]))


@cache
def _of_all_tokens() -> Tensor:
    """Queries (1, Hq, T, D) of all tokens, for routers that go by what these attend to."""
    return torch.randn(1, Q_HEADS, TOKENS, CHANNELS, generator=Generator().manual_seed(2))


@cache
def outlier_keys(channels: int = CHANNELS) -> Data:
    """The same, but keys are f (o + n) with normal n and, fixed for a channel, an offset o of variance 1/3 and f = 1;
    in an outlier channel o = +-1, n a fifth as large and f from 8 to 20."""
    data, generator = normal_numbers(channels), Generator().manual_seed(1)
    offset = torch.randn(HEADS, 1, channels, generator=generator) / math.sqrt(3)
    spread, factor = torch.ones(HEADS, 1, channels), torch.ones(HEADS, 1, channels)
    for head in range(HEADS):
        top = torch.randperm(channels, generator=generator)[:OUTLIERS]
        offset[head, 0, top] = torch.sign(torch.randn(OUTLIERS, generator=generator))
        spread[head, 0, top] = 0.2
        low, high = SIZES
        factor[head, 0, top] = low + (high - low) * torch.rand(OUTLIERS, generator=generator)
    q, k, v = data.others
    return replace(data, k=factor * (offset + spread * data.k), others=(q, factor * (offset + spread * k), v))


def _halved(q: Tensor, k: Tensor, v: Tensor) -> Data:
    """The first half of the tokens to measure on, the second to try."""
    (q0, q1), (k0, k1), (v0, v1) = (x.chunk(2, dim=2) for x in (q, k, v))
    return Data(q1.contiguous(), k1.contiguous(), v1.contiguous(), (q0.contiguous(), k0.contiguous(), v0.contiguous()))


def seeded(scheme: Scheme) -> bool:
    """Whether a side draws something at random."""
    return reseeded(scheme, 0) != reseeded(scheme, 1)


def reseeded(scheme: Scheme, seed: int) -> Scheme:
    """The scheme with this seed wherever it has one, and the next one in what codes what is left, or outlier channels:
    a map of its own."""
    return scheme.with_(keys=_reseeded(scheme.keys, seed), values=_reseeded(scheme.values, seed))


def _reseeded(store: Store, seed: int) -> Store:
    parts = tuple(
        part.with_(seed=seed) if isinstance(part, Rotate) and part.seed is not None else part
        for part in store.transform  # type: ignore[union-attr]
    )
    code = store.code.with_(seed=seed) if isinstance(store.code, Sketch) else store.code
    rest, top = store.residual, store.outliers
    rest = _reseeded(rest, seed + 1) if isinstance(rest, Store) else rest
    if isinstance(top, TopChannels):  # of two sketches of masked vectors one map is read for both
        top = replace(top, store=_reseeded(top.store, seed if top.online else seed + 1))
    return replace(store, code=code, transform=parts, outliers=top, residual=rest)


def studied(scheme: Scheme, seeds: int = 20, backend: Backend | None = None) -> dict[str, Spread]:
    """Mean and standard deviation over the seeds 0, 1, ... (one run where nothing is drawn) of

    keys_mse, values_mse   mean squared error of the packed round trip of standard normal numbers
    score_error            |q.k^ - q.k| / |q.k| over all queries and tokens, on keys with outlier channels
    output_error           |out^ - out| / |out| of causal attention to them, where values are standard normal

    Every token is packed, none is kept exact in a window.  Of a scheme with layers, its own stores are studied.  Tokens
    that a router drops count as zeros, and have no score.
    """
    runs = [_errors(reseeded(scheme, seed), backend) for seed in range(seeds)] if seeded(scheme) else []
    return _spread(runs or [_errors(scheme, backend)])


def _spread(runs: Sequence[tuple[float, ...]]) -> dict[str, Spread]:
    columns = zip(MEASURES, zip(*runs, strict=True), strict=True)
    return {
        name: {"mean": statistics.fmean(column), "std": statistics.stdev(column) if len(column) > 1 else 0.0}
        for name, column in columns
    }


def _errors(scheme: Scheme, backend: Backend | None) -> tuple[float, ...]:
    """One run, in the order of MEASURES."""
    data = _placed(scheme, _of(scheme, normal_numbers))
    params = _measured(scheme, data)
    every = _of_all_tokens() if scheme.routed else None
    found = roundtrip(scheme, data.k, data.v, backend=backend, window=False, params=params, queries=every)
    squared = [
        (got.double() - x.double()).square().mean().item() for got, x in zip(found, (data.k, data.v), strict=True)
    ]

    data = _placed(scheme, _of(scheme, outlier_keys))
    params = _measured(scheme, data)
    estimated = scores(scheme, data.q, data.k, backend=backend, window=False, params=params, queries=every)
    out, _ = attend(scheme, data.q, data.k, data.v, backend=backend, window=False, params=params, queries=every)
    right_scores, right_out = _exact(data)
    return (*squared, _relative(estimated, right_scores), _relative(out, right_out))


def _measured(scheme: Scheme, data: Data) -> dict[str, Tensor]:
    """What the scheme takes from the other tokens."""
    rope = {} if rope_of(scheme) is None else {ROPE: FREQUENCIES}
    q, k, v = data.others
    return calibrate(scheme, k, v, q, params=rope, gradients=of_outputs(q, k, v) if weighted(scheme) else None)


def _placed(scheme: Scheme, data: Data) -> Data:
    """The data as a model would give it: keys with rotary positions, where the scheme takes them off."""
    rope = rope_of(scheme)
    if rope is None:
        return data
    q, k, v = data.others
    at = torch.arange(TOKENS)
    first, second = (turned(x, FREQUENCIES, at, rope.interleaved).to(x.dtype) for x in (k, data.k))
    return replace(data, k=second, others=(q, first, v))


def _exact(data: Data) -> tuple[Tensor, Tensor]:
    """Scores before scaling (1, Hq, Q, T) and causal attention (1, Hq, Q, D) in float64."""
    k, v = (x.double().repeat_interleave(Q_HEADS // HEADS, 1) for x in (data.k, data.v))
    found = data.q.double() @ k.mT
    hidden = torch.ones(QUERIES, TOKENS, dtype=torch.bool).triu(TOKENS - QUERIES + 1)
    return found, (found * data.k.shape[3] ** -0.5).masked_fill(hidden, -torch.inf).softmax(-1) @ v


def _relative(got: Tensor, right: Tensor) -> float:
    return ((got.double() - right).norm() / right.norm()).item()
