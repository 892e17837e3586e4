"""What a scheme with tiers compiles to: each tier is a scheme of its own, and the exact tokens have kernels, too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from .kernels import Backend, KernelSet, Side
from .rules import refuse_for
from .scheme import Scheme
from .segments import Segment, front, segments
from .shape import Shape

Build = Callable[[Scheme, Shape, Backend | None], KernelSet]


@dataclass(frozen=True, eq=False)
class TierSet:
    """Kernels of one tier: those that read it for queries of the model's dtype, and those that pack it: the same, but
    for rows in float32 where other numbers than the tokens' own are coded; `single`: of one head's pages,
    where tokens may be written over one by one."""

    reading: KernelSet
    packing: KernelSet
    single: KernelSet | None


@dataclass(frozen=True, eq=False)
class TierKernels:
    """A scheme with tiers, compiled for a shape: kernels of the exact tokens, and of each tier, None where it drops.

    Of a shape with `placed` all of them know where tokens stand, as a sliding window asks; else those tiers alone whose
    keys are stored before their rotary positions.
    """

    scheme: Scheme
    shape: Shape
    exact: KernelSet
    tiers: tuple[TierSet | None, ...]

    @property
    def backend(self) -> Backend:
        """Of all of them."""
        return self.exact.backend

    @property
    def any_placed(self) -> bool:
        """Whether some of them are told where tokens stand."""
        return self.shape.placed or any(one is not None and one.reading.shape.placed for one in self.tiers)

    def dim(self, side: Side) -> int:
        """Numbers of a vector of one side."""
        return self.scheme.dim(side, self.shape.head_dim)

    def schedule_for(self, batch: int, tokens: int) -> str:
        """See KernelSet: the model's, where there are schedules, as what several tiers leave is merged at once."""
        return "torch" if self.backend == "torch" else "model"

    @property
    def why(self) -> str:
        """One sentence saying why this backend was taken."""
        return self.exact.why


def compiled(scheme: Scheme, shape: Shape, backend: Backend | None, build: Build) -> TierKernels:
    """Every tier compiled by `build`.  Raises SchemeError where the scheme does not fit the shape."""
    refuse_for(scheme, shape)
    exact = build(front(scheme), shape, backend)
    return TierKernels(
        scheme, shape, exact, tuple(_tier(scheme, one, shape, backend, build) for one in segments(scheme))
    )


def _tier(scheme: Scheme, one: Segment, shape: Shape, backend: Backend | None, build: Build) -> TierSet | None:
    if one.scheme is None:
        return None
    shape = one.placed(shape)
    reading = build(one.scheme, shape, backend)
    rows = replace(shape, dtype="fp32") if one.rewritten else shape
    packing = reading if rows == shape else build(one.scheme, rows, backend)
    assert packing.page_bytes == reading.page_bytes
    down = scheme.router is not None and scheme.router.moves == "down" and scheme.requantize == "never"
    return TierSet(reading, packing, build(one.scheme, rows.of_heads(1), backend) if down else None)
