"""How long decode attention reads a model's cache, predicted from packed bytes and machine code: the time of a sweep.

    time = sum over layers of packed bytes / (share * limit) + exact bytes / (0.93 * limit)

limit is what a reading kernel reaches on the GPU, share what roofline.py says of the decode kernel's main loop.  Where
a kernel was not compiled its share is that of a loop without any work, 0.93, and the time says bytes alone.  Latency,
the merge and the launch are not in it: it orders schemes at lengths at which reading is what counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvdsl.cost import EXACT, bits
from kvdsl.errors import BackendError, SchemeError, ShapeError
from kvdsl.scheme import Scheme
from kvdsl.segments import segments
from kvdsl.shape import Shape
from kvdsl.tier_shares import shares as token_shares

from .roofline import Gpu, reading_time, share_on
from .static import figures

TOGETHER = 4  # schemes compiled side by side


@dataclass(frozen=True)
class Stretch:
    """What one kernel reads of a layer: bytes, and the scheme without tiers that it is of; None of exact rows."""

    scheme: Scheme | None
    shape: Shape
    nbytes: float


def stretches(scheme: Scheme, shape: Shape, layers: int, tokens: int, batch: int) -> list[Stretch]:
    """All that a step reads, alike layers added up."""
    found = dict[tuple[Scheme | None, Shape], float]()
    for index in range(layers):
        for one in _of_layer(scheme.for_layer(index, layers), shape, tokens):
            key = (one.scheme, one.shape)
            found[key] = found.get(key, 0.0) + batch * one.nbytes
    return [Stretch(*key, nbytes) for key, nbytes in found.items()]


def _of_layer(scheme: Scheme, shape: Shape, tokens: int) -> Iterator[Stretch]:
    """One sequence of one layer."""
    if scheme.heads:
        for heads, one in scheme.by_heads(shape.kv_heads):
            yield from _of_layer(one, shape.of_heads(len(heads)), tokens)
        return
    numbers = 2 * shape.kv_heads * shape.head_dim * tokens / 8  # bytes of one bit a number
    counted = bits(scheme, shape.head_dim, shape.kv_heads, tokens=tokens)
    if not scheme.routed:
        packed = counted.mean - counted.window
        yield Stretch(scheme, shape, numbers * packed)
        yield Stretch(None, shape, numbers * counted.window)
        return
    parts, exact = token_shares(scheme, tokens)
    for segment, part in zip(segments(scheme), parts, strict=True):
        if segment.scheme is not None:
            held = bits(segment.scheme, shape.head_dim, shape.kv_heads).mean
            yield Stretch(segment.scheme, segment.placed(shape), numbers * part * held)
    yield Stretch(None, shape, numbers * exact * EXACT)


def predicted_time(
    scheme: Scheme,
    shape: Shape,
    layers: int,
    *,
    tokens: int,
    batch: int,
    gpu: Gpu,
    compiled: Mapping[tuple[Scheme, Shape], float] | None = None,
) -> dict[str, float]:
    """microseconds of a step, and the share of the read limit at which its bytes come in all."""
    time, whole = 0.0, 0.0
    for one in stretches(scheme, shape, layers, tokens, batch):
        share = None if one.scheme is None else (compiled or {}).get((one.scheme, one.shape))
        time += reading_time(gpu, one.nbytes, share)
        whole += one.nbytes
    return {"microseconds": time, "share": reading_time(gpu, whole, 1.0) / time if time else share_on(gpu, {})}


def compiled_shares(
    schemes: Sequence[Scheme], shape: Shape, layers: int, gpu: Gpu, say: Callable[[str], None] = lambda _: None
) -> dict[tuple[Scheme, Shape], float]:
    """The share of every kernel that schemes are read by, compiled here; what does not compile is missing."""
    wanted = dict.fromkeys(
        (one.scheme, one.shape)
        for scheme in schemes
        for one in stretches(scheme, shape, layers, 1, 1)
        if one.scheme is not None
    )
    found = dict[tuple[Scheme, Shape], float]()
    keys = [*wanted]
    for begin in range(0, len(keys), TOGETHER):
        say(f"machine code {begin + 1} of {len(keys)}")
        some = keys[begin : begin + TOGETHER]
        for group in (some, *([one] for one in some)):  # one by one where some of them do not compile
            if missing := [key for key in group if key not in found]:
                try:
                    found |= _shares(missing, gpu)
                except (BackendError, SchemeError, ShapeError):
                    continue
                if group is some:
                    break
    return found


def _shares(keys: Sequence[tuple[Any, Shape]], gpu: Gpu) -> dict[tuple[Scheme, Shape], float]:
    found = dict[tuple[Scheme, Shape], float]()
    for shape in dict.fromkeys(shape for _, shape in keys):
        names = {f"scheme_{i}": scheme for i, (scheme, own) in enumerate(keys) if own == shape}
        for name, rows in figures(names, shape, (gpu.arch,)).items():
            share = rows[0].kernel.shares.get(gpu.name) if rows else None
            if share is not None:
                found[names[name], shape] = share
    return found
