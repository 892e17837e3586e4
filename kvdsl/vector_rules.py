"""What is legal of codes of vectors: they stand alone, and channels that share one are of one head and one pack."""

from __future__ import annotations

import math
from collections.abc import Iterator

from .additive_rules import maps_before, of_the_model
from .codes import Weights
from .errors import Fault
from .kinds import KINDS, count, word
from .scheme import Vectors
from .shape import Shape
from .sites import Site, rule

MOST_COUPLED = 8  # numbers that share a code

KINDS[Vectors] = {
    "bits": count(1, 8, "bits"),
    "channels": count(2, MOST_COUPLED, "channels"),
    "weights": word(Weights, optional=True),
}


@rule("~.code", "~.scale", "~.outliers", "~.residual")
def _vectors_stand_alone(site: Site) -> Iterator[Fault]:
    store = site.store
    if not isinstance(store.code, Vectors):
        return
    yield from of_the_model(site)
    if store.scale is not None:
        yield site.fault("scale", "vectors are of numbers as they come, of their size, too", "leave scale out")
    if store.outliers is not None:
        yield site.fault("outliers", "vectors are of all channels, and none is split off", "leave outliers out")
    if store.residual is not None:
        yield site.fault("residual", "what vectors leave is not coded", "leave residual out, or use more bits")


@rule("~.code.channels")
def _packs_of_channels_are_loaded_at_once(site: Site) -> Iterator[Fault]:
    code = site.store.code
    if isinstance(code, Vectors) and code.channels.bit_count() > 1:
        fact = f"the {code.channels} numbers of a vector are no power of two, and words of a table are cut into halves"
        yield site.fault("code.channels", fact, "use channels=2, 4 or 8")


@rule("~.code", "~.transform")
def _channels_that_share_a_code_are_neighbours(site: Site) -> Iterator[Fault]:
    if not isinstance(site.store.code, Vectors):
        return
    yield from maps_before(site, "neighbouring channels")


def shape_faults(site: Site, shape: Shape) -> Iterator[Fault]:
    """Groups that do not divide a head, or whose codes fill no whole bytes."""
    code, size = site.store.code, site.head_dim(shape)
    if not isinstance(code, Vectors):
        return
    if size % code.channels:
        fact = f"vectors of {code.channels} channels do not divide {site.said_dim(shape)}"
        common = math.gcd(code.channels, size)
        yield site.fault("code.channels", fact, f"use {common}" if common > 1 else "use Codebook(4, 'calibrated')")
        return
    groups, narrowest = code.groups(size), code.bits & -code.bits
    if groups * narrowest % 8:
        fact = f"{groups} codes of {code.bits} bits, of {site.said_dim(shape)}, fill no whole bytes"
        yield site.fault("code.bits", fact, f"use bits={8 // math.gcd(8, groups)} or 8")
