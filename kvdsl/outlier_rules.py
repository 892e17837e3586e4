"""What is legal of outlier channels: what may code them, and how many there may be."""

from __future__ import annotations

from collections.abc import Iterator

from .errors import Fault
from .scheme import Bands, Float, Rotate, Sketch, TopChannels
from .shape import Shape
from .sites import Site, rule

LEAST = 8  # channels: a row of one-bit codes is whole bytes


@rule("~.code", "~.outliers", "~.transform")
def _channels_are_split_off_a_vector(site: Site) -> Iterator[Fault]:
    store = site.store
    if isinstance(store.outliers, TopChannels) and (site.inner or site.band is not None):
        yield site.fault("outliers", "outlier channels are those of a vector as it came", "leave outliers out")
    if store.split is None and not (site.apart and site.pick):
        return
    if isinstance(store.code, (Bands, Sketch)):
        fact = f"{type(store.code).__name__} is of a whole vector, and outlier channels part it"
        yield site.fault("code", fact, "use Uniform(bits=2) under a scale")
    for position, part in enumerate(store.transform):  # type: ignore[arg-type]
        if isinstance(part, Rotate) and part.heads != 1:
            fact = f"the outlier channels of {part.heads} heads are not the same"
            yield site.fault(f"transform[{position}].heads", fact, "leave heads out")
    if store.rope is not None:
        fact = "outlier channels of keys without RoPE would have to be turned back on their own"
        yield site.fault("outliers", fact, "leave it out, or leave out PreRope()")


@rule("~.residual")
def _what_outlier_channels_leave_is_left_of_the_vector(site: Site) -> Iterator[Fault]:
    if site.apart and site.store.residual is not None:
        fact = "what outlier channels leave is left of the whole vector"
        yield site.fault("residual", fact, "move residual to the outer store")


def nothing_left(site: Site) -> Iterator[Fault]:
    """The faults of codes beside which nothing of a vector is left to be kept."""
    code = site.store.code
    if isinstance(code, Float) and code.plain:
        fact = f"{code.format} keeps every number as it is"
        yield site.fault("outliers", fact, "leave outliers out, or lower the code's bits")
    if isinstance(code, Bands):
        fact = "bands are all that is kept of a vector"
        yield site.fault("outliers", fact, "leave it out, or use one code for all numbers, as Uniform(bits=4)")


def shape_faults(site: Site, shape: Shape) -> Iterator[Fault]:
    """Counts of channels that do not fit a head."""
    if site.store.split is None or site.pick is None:
        return
    others = site.head_dim(shape)
    top = shape.head_dim - others
    if top % LEAST or not LEAST <= top <= shape.head_dim - LEAST:
        fact = f"{top} of {shape.head_dim} channels are no multiple of {LEAST} with {LEAST} others beside it"
        near = min(max(LEAST, round(top / LEAST) * LEAST), shape.head_dim - LEAST)
        yield site.fault("outliers.n", fact, f"use {near}")
