"""What is legal of a rotation: its seed, its blocks, and the heads that are rotated as one vector."""

from __future__ import annotations

import math
from collections.abc import Iterator

from .errors import Fault
from .part import counted, shares
from .scheme import ALL, Rotate
from .shape import Shape
from .sites import Site, rule


@rule("~.transform")
def _a_rotation_is_drawn_from_a_seed(site: Site) -> Iterator[Fault]:
    for position, part in enumerate(site.store.transform):  # type: ignore[arg-type]
        if not isinstance(part, Rotate):
            continue
        place = f"transform[{position}]"
        drawn = part.kind not in ("hadamard", "bit_reversal")
        if drawn and part.seed is None:
            yield site.fault(f"{place}.seed", f"{part.kind} is drawn at random", "give seed=0")
        if not drawn and part.seed is not None:
            mend = "leave seed out, or use kind='random_hadamard'"
            yield site.fault(f"{place}.seed", f"nothing of a {part.kind} rotation is drawn", mend)
        if part.heads > 1 and part.size is not ALL:
            fact = f"{part.heads} heads are rotated as one vector, and blocks of {part.size} channels would part it"
            yield site.fault(f"{place}.size", fact, "leave size out, or leave heads out")
            continue
        for size in part.size if isinstance(part.size, tuple) else (part.size,):
            if part.kind != "orthogonal" and isinstance(size, int) and not _is_power(size):
                yield site.fault(f"{place}.size", *_no_power(size))


def shape_faults(site: Site, shape: Shape) -> Iterator[Fault]:
    """Every mistake of a store's rotations that shows only at a shape."""
    for position, part in enumerate(site.store.transform):  # type: ignore[arg-type]
        if isinstance(part, Rotate):
            yield from _at_shape(site, f"transform[{position}]", part, shape)


def _at_shape(site: Site, place: str, part: Rotate, shape: Shape) -> Iterator[Fault]:
    head_dim = site.head_dim(shape)
    channels = part.heads * head_dim
    if isinstance(part.size, tuple):
        yield from _blocks(site, place, part, shape)
        return
    size = part.size if isinstance(part.size, int) else channels
    if shape.kv_heads % part.heads:
        fits = math.gcd(part.heads, shape.kv_heads)
        fact = f"{part.heads} heads do not divide {shape.kv_heads} kv heads"
        yield site.fault(f"{place}.heads", fact, f"use heads={fits}" if fits > 1 else "leave heads out")
    elif channels % size:
        common = math.gcd(size, channels)
        fact = f"blocks of {size} channels do not divide {site.said_dim(shape)}"
        yield site.fault(f"{place}.size", fact, f"use size={common}" if common > 1 else "leave size out")
    elif part.kind != "orthogonal" and not _is_power(size):
        yield _no_hadamard(site, place, part, shape) if part.heads > 1 else site.fault(place, *_no_power(size))


def _blocks(site: Site, place: str, part: Rotate, shape: Shape) -> Iterator[Fault]:
    """Of several sizes."""
    head_dim = site.head_dim(shape)
    assert isinstance(part.size, tuple)
    sizes = counted(part.size, head_dim)
    told = " and ".join(map(str, part.size))
    if sum(sizes) != head_dim or any(share * head_dim % 1 for share in shares(part.size)):
        fact = f"blocks of {told} channels are not {site.said_dim(shape)}"
        yield site.fault(f"{place}.size", fact, "give sizes, or shares, that are whole numbers and all of it")
    elif part.kind != "orthogonal" and (odd := [size for size in sizes if not _is_power(size)]):
        yield site.fault(f"{place}.size", *_no_power(odd[0]))


def _no_hadamard(site: Site, place: str, part: Rotate, shape: Shape) -> Fault:
    """Of several heads, whose matrix takes no size of its own."""
    fact = f"a Hadamard rotation needs a power of two, {part.heads} heads of {shape.head_dim} channels are none"
    near = part.heads & -part.heads
    if near > 1 and _is_power(shape.head_dim):
        return site.fault(f"{place}.heads", fact, f"use heads={near} or kind='orthogonal'")
    return site.fault(place, fact, "use kind='orthogonal'")


def _is_power(count: int) -> bool:
    return count.bit_count() == 1


def _no_power(size: int) -> tuple[str, str]:
    near = size & -size
    mend = f"use size={near} or kind='orthogonal'" if near > 1 else "use kind='orthogonal'"
    return f"a Hadamard rotation needs a power of two, {size} is none", mend
