"""What is legal of sums of vectors: they stand alone, under one scale a token, of a head's vector as it comes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .errors import Fault
from .kinds import KINDS, count, flag, share
from .scheme import ALL, Additive, Balance, Polar, PreRope, Rotate
from .shape import Shape
from .sites import Site, rule

MOST_STAGES = 256
LANES = 16  # channels that are read at a time at least


def _stages(place: str, value: Any) -> Iterator[Fault]:
    """A count, or a share of a head's channels."""
    whole = isinstance(value, float)
    yield from (share("channels", 1, "0.125, or a count, as 16") if whole else count(1, MOST_STAGES, "stages"))(
        place, value
    )


KINDS[Additive] = {
    "bits": count(1, 8, "bits"),
    "stages": _stages,
    "commuting": flag,
}


def of_the_model(site: Site) -> Iterator[Fault]:
    """Tables of vectors are of what a model gives, not of what another part leaves."""
    if site.inner or site.band is not None:
        what = "this is a stretch" if site.band is not None else "this is a part"
        fact = f"tables of vectors are fitted to what comes from the model, and {what} of that"
        yield site.fault("code", fact, "use Uniform(bits=2) under a scale")


def maps_before(site: Site, channels: str) -> Iterator[Fault]:
    """What may not come before codes of vectors of such channels of a head."""
    parts = site.store.transform
    for position, part in enumerate(parts):  # type: ignore[arg-type]
        place = f"transform[{position}]"
        if isinstance(part, (Polar, Balance)):
            fact = f"{type(part).__name__} is followed by codes of single numbers"
            yield site.fault(place, fact, "leave it out")
        elif isinstance(part, Rotate) and part.heads > 1:
            fact = f"tables of vectors are a head's own, and {part.heads} heads are rotated as one vector"
            yield site.fault(f"{place}.heads", fact, "leave heads out")
        elif position and isinstance(parts[0], PreRope):  # type: ignore[index]
            fact = f"behind PreRope() vectors are of {channels}, as they come"
            yield site.fault(place, fact, "leave it out, or leave out PreRope()")


@rule("~.code", "~.outliers", "~.residual")
def _sums_stand_alone(site: Site) -> Iterator[Fault]:
    store = site.store
    if not isinstance(store.code, Additive):
        return
    yield from of_the_model(site)
    if store.outliers is not None:
        yield site.fault("outliers", "vectors are of all channels, and none is split off", "leave outliers out")
    if store.residual is not None:
        yield site.fault(
            "residual", "what the last stage leaves is not coded", "leave residual out, or use more stages"
        )


@rule("~.code", "~.scale")
def _sums_are_of_vectors_of_about_one_size(site: Site) -> Iterator[Fault]:
    if not isinstance(site.store.code, Additive):
        return
    scale, mend = site.scale, "use scale=per_token(), or per_token(heads=ALL)"
    if scale is None:
        yield site.fault("scale", "stages refine vectors of about one size, and nothing measures it", mend)
        return
    block = scale.block
    if scale.when == "calibrated" or block.tokens != 1 or block.channels is not ALL:
        yield site.fault("scale.block", "the size of a vector is one number a token, of all channels", mend)
    if scale.range != "norm":
        fact = f"the size of a vector is its norm, and {scale.range} is of single numbers"
        yield site.fault("scale.range", fact, "leave range out")
    if isinstance(scale.clip, tuple) or scale.refit is not None or scale.scale is not None:
        fact = "codes are looked for once, under the norm as it is stored"
        yield site.fault("scale", fact, "leave out tuples of clip, refit and scale")


@rule("~.code", "~.transform")
def _sums_are_of_a_head_as_it_comes(site: Site) -> Iterator[Fault]:
    if isinstance(site.store.code, Additive):
        yield from maps_before(site, "all channels")


def shape_faults(site: Site, shape: Shape) -> Iterator[Fault]:
    """Heads that are not read in whole planes."""
    code, size = site.store.code, site.head_dim(shape)
    if isinstance(code, Additive) and size % LANES:
        fact = f"sums are read {LANES} channels at a time at least, and these do not divide {site.said_dim(shape)}"
        yield site.fault("code", fact, "use Vectors(8, channels=4), or another head_dim")
