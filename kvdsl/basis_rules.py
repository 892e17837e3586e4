"""What is legal of a basis that keeps its first numbers alone: where it stands, and what codes those."""

from __future__ import annotations

from collections.abc import Iterator

from .band_rules import LEAST
from .errors import Fault
from .scheme import ALL, Additive, Bands, Eigenbasis, Sparse, Vectors
from .shape import Shape
from .sites import Site, rule


@rule("~.transform")
def _numbers_are_left_out_last(site: Site) -> Iterator[Fault]:
    parts = site.store.transform
    for position, part in enumerate(parts[:-1]):  # type: ignore[index]
        if isinstance(part, Eigenbasis) and part.rank is not ALL:
            fact = f"{type(parts[-1]).__name__} is of whole vectors, of which rank={part.rank} keeps a part"  # type: ignore
            yield site.fault(f"transform[{position}].rank", fact, "put the basis last, or leave rank out")


@rule("~.code", "~.transform", "~.outliers")
def _what_is_left_is_coded_alone(site: Site) -> Iterator[Fault]:
    store = site.store
    if not store.short or site.band is not None:
        return
    place = f"transform[{len(store.transform) - 1}].rank"  # type: ignore[arg-type]
    if isinstance(store.code, (Additive, Vectors)):
        fact = f"the tables of {type(store.code).__name__} are of all numbers of a head"
        yield site.fault(place, fact, "leave rank out, or use Uniform(2) under a scale")
    if isinstance(store.code, Bands) and store.code.head_dim is not None:
        counts = " and ".join(map(str, store.code.channels))
        fact = f"{counts} say how long a vector is, and fewer numbers of it are kept"
        yield site.fault("code.channels", fact, "give shares of those that are kept, as (0.25, 0.75)")
    if isinstance(store.outliers, Sparse) and store.rope is not None:
        fact = "behind PreRope() single numbers stand beside as many numbers as the head has channels"
        yield site.fault("outliers", fact, "leave it out, or rank")
    if store.joined > 1:
        fact = f"{store.joined} heads that are rotated as one vector have all their numbers"
        yield site.fault(place, fact, "leave rank out, or use Rotate(...) with heads=1")


def shape_faults(site: Site, shape: Shape) -> Iterator[Fault]:
    """Numbers that are kept of a head that has fewer, or that fill no whole bytes."""
    store = site.store
    for position, part in enumerate(store.transform):  # type: ignore[arg-type]
        if not isinstance(part, Eigenbasis) or part.rank is ALL:
            continue
        whole = site.head_dim(shape)
        kept = part.width(whole)
        exact = part.rank * whole if isinstance(part.rank, float) else kept
        if kept > whole:
            yield site.fault(f"transform[{position}].rank", f"{kept} of {site.said_dim(shape)}", "leave it out")
        elif exact % LEAST:
            fact = f"{exact:g} numbers of {site.said_dim(shape)} are no multiple of {LEAST}"
            near = max(LEAST, round(exact / LEAST) * LEAST)
            yield site.fault(f"transform[{position}].rank", fact, f"use {near}, or another share")
