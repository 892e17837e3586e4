"""What is legal of polar coordinates: where they stand, and that no scale is one of radii and of angles."""

from __future__ import annotations

import math
from collections.abc import Iterator

from .codes import in_trits, width
from .errors import Fault
from .scheme import ALL, Bands, Polar
from .shape import Shape
from .sites import Site, rule


@rule("~.transform")
def _polar_coordinates_come_last(site: Site) -> Iterator[Fault]:
    parts = site.store.transform
    for position, part in enumerate(parts):  # type: ignore[arg-type]
        if isinstance(part, Polar) and position < len(parts) - 1:  # type: ignore[arg-type]
            fact = "behind polar coordinates there is no vector that could be mapped"
            yield site.fault(f"transform[{position}]", fact, "put Polar() last, once")


@rule("~.transform", "~.scale.block", "~.scale.scale")
def _radii_and_angles_share_no_scale(site: Site) -> Iterator[Fault]:
    scale = site.scale
    if not site.store.polar or scale is None or isinstance(site.store.code, Bands):
        return
    if scale.block.channels is ALL:
        fact = "one scale over all channels is one of radii and of angles, which have no unit in common"
        yield site.fault("scale.block.channels", fact, "use per_channel(tokens=128), or 32 channels for each scale")
    if scale.scale is not None:
        fact = "a second level is one unit for the scales of radii and of angles, which have none in common"
        yield site.fault("scale.scale", fact, "leave it out, and use dtype='fp16'")


@rule("~.transform", "~.code")
def _radii_and_angles_share_no_byte(site: Site) -> Iterator[Fault]:
    if site.store.polar and in_trits(site.store.code):
        fact = "five ternary digits a byte would mix radii and angles"
        yield site.fault("code.bits", fact, "use bits=2")


def _whole_bytes(site: Site, shape: Shape) -> Iterator[Fault]:
    """Codes of a band stand in streams of 8, 4, 2 and 1 bits, each a whole number of bytes a token."""
    for position, band in enumerate(site.store.terms):
        bits, numbers = width(band.code) or 0, band.coded(site.head_dim(shape))
        narrowest = bits & -bits
        if numbers * narrowest % 8:
            fact = f"{numbers} codes of {bits} bits, of {site.said_dim(shape)}, fill no whole bytes"
            wide = 8 // math.gcd(8, numbers)
            mend = f"use {wide}, or fewer levels in Polar()" if wide <= 4 else "use fewer levels in Polar()"
            yield site.fault(f"code.stores[{position}].code.bits", fact, mend)


def shape_faults(site: Site, shape: Shape) -> Iterator[Fault]:
    """Mistakes of polar coordinates that show only at a shape."""
    if not site.store.polar:
        return
    block, head_dim = 2**site.store.levels, site.head_dim(shape)
    if head_dim % block:
        at = next(i for i, part in enumerate(site.store.transform) if isinstance(part, Polar))  # type: ignore[arg-type]
        fact = f"blocks of {block} channels do not divide {site.said_dim(shape)}"
        yield site.fault(f"transform[{at}].levels", fact, f"use {(head_dim & -head_dim).bit_length() - 1}")
    if isinstance(site.store.code, Bands):
        yield from _whole_bytes(site, shape)
    size, half = site.scale.block.channels if site.scale is not None else 1, head_dim // 2
    if isinstance(size, int) and half % size and head_dim % size == 0:  # others divide nothing, and are refused
        fact = f"groups of {size} channels do not divide the {half} radii of {site.said_dim(shape)}"
        yield site.fault("scale.block.channels", fact, f"use {math.gcd(half, size)}")
