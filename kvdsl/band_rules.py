"""What is legal of bands: who says where they end, and what may code one of them."""

from __future__ import annotations

from collections.abc import Iterator

from .codes import in_trits
from .errors import Fault
from .part import shares
from .scheme import Balance, Bands, Codebook, Polar, PreRope, Rotate, Sketch
from .shape import Shape
from .sites import Site, rule

LEAST = 8  # channels that a stretch is a multiple of, where it is a share of a head: whole bytes of every code


@rule("~.code", "~.transform")
def _bands_are_those_of_polar_coordinates(site: Site) -> Iterator[Fault]:
    code, levels = site.store.code, 0
    for position, part in enumerate(site.store.transform):  # type: ignore[arg-type]
        if not isinstance(part, Polar):
            continue
        levels = part.levels
        if levels > 1 and not isinstance(code, Bands):
            fact = f"radii and angles of {levels} levels are too unlike for one code"
            yield site.fault(f"transform[{position}].levels", fact, "use code=Bands(...), or levels=1")
    if not isinstance(code, Bands) or code.channels:
        return
    if not levels:
        mend = "add transform=Polar(levels=4), or say it, as channels=(512, 64)"
        yield site.fault("code", "nothing says where one stretch of numbers ends", mend)
    elif len(code.stores) != levels + 1:
        fact = f"{len(code.stores)} stores for the radii and {levels} levels of angles"
        yield site.fault("code.stores", fact, f"give {levels + 1}, that of the radii first")


@rule("~.code", "~.transform")
def _stretches_of_channels_are_of_the_vector(site: Site) -> Iterator[Fault]:
    code = site.store.code
    if not isinstance(code, Bands) or not code.channels:
        return
    if len(code.stores) != len(code.channels):
        fact = f"{len(code.channels)} stretches for {len(code.stores)} stores"
        yield site.fault("code.channels", fact, f"give {len(code.stores)} counts")
    for position, part in enumerate(site.store.transform):  # type: ignore[arg-type]
        mixed = isinstance(part, PreRope) and site.store.mixed
        if isinstance(part, (PreRope, Polar, Balance)) and not mixed:
            fact = f"stretches of channels have none behind {type(part).__name__}"
            mend = "leave it out, or leave channels out behind Polar()"
            if isinstance(part, PreRope):
                mend = "leave it out, or put a map of all channels behind it, as Eigenbasis('own')"
            yield site.fault(f"transform[{position}]", fact, mend)


@rule("~.code", "~.scale", "~.residual", "~.transform")
def _each_band_has_its_own(site: Site) -> Iterator[Fault]:
    if not isinstance(site.store.code, Bands):
        return
    if site.store.scale is not None:
        yield site.fault("scale", "each stretch has a scale of its own", "move it into the stores of Bands")
    if site.store.residual is not None:
        yield site.fault("residual", "what stretches leave is not coded", "leave it out, or give them more bits")
    for position, part in enumerate(site.store.transform):  # type: ignore[arg-type]
        if isinstance(part, Rotate) and part.heads != 1:
            fact = f"stretches are of one head's vector, not of {part.heads} heads'"
            yield site.fault(f"transform[{position}].heads", fact, "leave heads out")
    if site.left:
        yield site.fault("code", "what is left of a vector is coded as a whole", "use Uniform(2), or a Sketch")


@rule("~.code", "~.scale", "~.transform", "~.residual")
def _a_band_is_a_code_under_a_scale(site: Site) -> Iterator[Fault]:
    store = site.store
    if site.band is None:
        return
    if isinstance(store.code, (Bands, Sketch)):
        fact = f"{type(store.code).__name__} is of a whole vector, and this is a stretch of one"
        yield site.fault("code", fact, "use Uniform(bits=2) under a scale, or Float('fp16')")
    elif in_trits(store.code):
        yield site.fault("code.bits", "five ternary digits a byte are of one vector, not of a stretch", "use bits=2")
    if store.transform:
        yield site.fault("transform", "a stretch is coded as it is", "move it to the outer store")
    if store.residual is not None:
        yield site.fault("residual", "what a stretch leaves is not coded", "leave it out")


@rule("~.code", "~.scale")
def _a_band_is_measured_online(site: Site) -> Iterator[Fault]:
    scale, code = site.scale, site.store.code
    if site.band is None:
        return
    if scale is not None and scale.when == "calibrated":
        yield site.fault("scale.when", "stretches are not calibrated", "use when='online'")
    if scale is not None and scale.scale is not None:
        yield site.fault("scale.scale", "stretches are not calibrated", "leave the second level out")
    if isinstance(code, Codebook) and code.levels == "calibrated":
        yield site.fault("code.levels", "stretches are not calibrated", "use levels='angle', or give numbers")


@rule("~.code", "~.scale")
def _angles_are_in_radians(site: Site) -> Iterator[Fault]:
    code = site.store.code
    if not isinstance(code, Codebook) or code.levels != "angle":
        return
    if not site.band:
        mend = "use it in Bands((radii, Store(Codebook(4, 'angle')), ...)) behind Polar(), or levels='normal'"
        yield site.fault("code.levels", "no angles are coded here", mend)
    elif site.store.scale is not None:
        yield site.fault("scale", "the law of angles gives them in radians", "leave scale out")


def shape_faults(site: Site, shape: Shape) -> Iterator[Fault]:
    """Stretches that are shares of a head, and no whole numbers of bytes of it."""
    code = site.store.code
    if not isinstance(code, Bands) or not code.channels or code.head_dim is not None:
        return
    for position, share in enumerate(shares(code.channels)):
        whole = site.store.width(shape.head_dim)
        if share * whole % LEAST:
            of = f"the {whole} numbers that are kept" if site.store.short else f"head_dim {shape.head_dim}"
            fact = f"{float(share):g} of {of} are no multiple of {LEAST} channels"
            mend = "use other shares, as (0.25, 0.5, 0.25) of 64 or 128"
            yield site.fault(f"code.channels[{position}]", fact, mend)
