"""What a scheme with tiers compiles to: each tier is a scheme of its own, and the exact tokens have kernels, too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from .kernels import Backend, KernelSet, Params
from .params import checked
from .scheme import SIDES, Scheme
from .segments import Segment, front, segments
from .shape import Shape

Build = Callable[[Scheme, Shape, Backend | None], KernelSet]


@dataclass(frozen=True, eq=False)
class TierSet:
    """Kernels of one tier: those that read it for queries of the model's dtype, and those that pack it: the same, but
    for rows in float32 where something is measured of all tokens and taken out of them; `single`: of one head's pages,
    where tokens may be written over one by one."""

    reading: KernelSet
    packing: KernelSet
    single: KernelSet | None


@dataclass(frozen=True, eq=False)
class TierKernels:
    """A scheme with tiers, compiled for a shape: kernels of the exact tokens, and of each tier (None where it drops)."""

    scheme: Scheme
    shape: Shape
    exact: KernelSet
    tiers: tuple[TierSet | None, ...]

    @property
    def backend(self) -> Backend:
        """Of all of them."""
        return self.exact.backend

    @property
    def why(self) -> str:
        """One sentence saying why this backend was taken."""
        return self.exact.why

    def ready(self, params: Params | None, device: torch.device) -> tuple[Params, ...]:
        """The numbers that each tier's kernels take, made of those named `tiers[i].keys.scale` and so on.  ShapeError
        where one is missing or does not fit."""
        found = []
        for number, one in enumerate(segments(self.scheme)):
            given = {name: x for full, x in (params or {}).items() if (name := _within(full, number)) is not None}
            given |= _units(one, self.shape)
            found.append({} if one.scheme is None else checked(one.scheme, self.shape, given, device))
        return tuple(found)


def compiled(scheme: Scheme, shape: Shape, backend: Backend | None, build: Build) -> TierKernels:
    """Every tier compiled by `build`."""
    exact = build(front(scheme), shape, backend)
    return TierKernels(scheme, shape, exact, tuple(_tier(scheme, one, shape, backend, build) for one in segments(scheme)))


def _tier(scheme: Scheme, one: Segment, shape: Shape, backend: Backend | None, build: Build) -> TierSet | None:
    if one.scheme is None:
        return None
    reading = build(one.scheme, shape, backend)
    packing = build(one.scheme, replace(shape, dtype="fp32"), backend) if any(one.measured) else reading
    assert packing.page_bytes == reading.page_bytes
    down = scheme.router is not None and scheme.router.moves == "down" and scheme.requantize == "never"
    queries = None if shape.q_heads is None else shape.q_heads // shape.kv_heads
    alone = replace(packing.shape, kv_heads=1, q_heads=queries)
    return TierSet(reading, packing, build(one.scheme, alone, backend) if down else None)


def _within(name: str, number: int) -> str | None:
    prefix = f"tiers[{number}]."
    return name.removeprefix(prefix) if name.startswith(prefix) else None


def _units(one: Segment, shape: Shape) -> Params:
    """Scales of 1 and offsets of 0, for codes of numbers that what was measured is taken out of already."""
    sizes = (shape.kv_heads, shape.head_dim)
    unit = torch.stack([torch.ones(sizes), torch.zeros(sizes)])
    return {f"{side}.scale": unit for side in SIDES if (about := one.of(side)) is not None and about.by == "range"}
