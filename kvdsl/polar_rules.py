"""What is legal of polar coordinates: where they stand, and that no scale is one of radii and of angles."""

from __future__ import annotations

import math
from collections.abc import Iterator

from .codes import in_trits
from .errors import Fault
from .scheme import ALL, Polar
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
    if not site.store.polar or scale is None:
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


def shape_faults(site: Site, shape: Shape) -> Iterator[Fault]:
    """Mistakes of polar coordinates that show only at a shape."""
    if not site.store.polar:
        return
    size, half = site.scale.block.channels if site.scale is not None else 1, shape.head_dim // 2
    if isinstance(size, int) and half % size and shape.head_dim % size == 0:  # others divide nothing, and are refused
        fact = f"groups of {size} channels do not divide the {half} radii of head_dim {shape.head_dim}"
        yield site.fault("scale.block.channels", fact, f"use {math.gcd(half, size)}")
