"""What is legal of a measure: ranges that suit their levels, clips, second fits, formats of metadata, second levels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .errors import Fault
from .kinds import KINDS
from .saying import said
from .scheme import ALL, Codebook, Float, MetaFormat, Scale, Uniform
from .sites import Site, rule

LEAST: dict[MetaFormat, int] = {"fp16": -24, "bf16": -126, "fp32": -126, "e4m3": -9}
"""The exponents of the least numbers that a floor may be; of formats with as many as float32 of normal ones."""


def floor(place: str, value: Any) -> Iterator[Fault]:
    """A float that a scale is no less than."""
    if type(value) is not float or not 0 <= value <= 1:
        fact = f"{said(value)} is no number that scales would be no less than"
        yield Fault(place, fact, "use a float up to 1, as 2.0**-9, or 0.0 for none")


KINDS[Scale]["floor"] = floor


@rule("~.code", "~.scale.range", "~.scale.when")
def _a_range_suits_its_levels(site: Site) -> Iterator[Fault]:
    code, scale = site.store.code, site.scale
    if scale is None:
        return
    ranged, known = scale.range in ("minmax", "minmax_zero"), isinstance(code, Codebook) and code.levels
    if isinstance(code, Uniform) and scale.range in ("norm", "absmean"):
        fact = f"evenly spaced levels end where the range ends, and {scale.range} has no ends"
        yield site.fault("scale.range", fact, "use range='absmax', or Codebook(levels=(-1, 0, 1))")
    elif isinstance(code, Float) and (ranged or scale.range == "signed_absmax"):
        fact = f"the numbers of {code.format} lie about 0 alike on both sides, {scale.range} about another middle"
        yield site.fault("scale.range", fact, "leave range out")
    elif ranged and isinstance(known, str) and known != "calibrated":
        fact = f"{scale.range} puts -1 and 1 on the ends of the range, and levels for {known!r} lie otherwise"
        yield site.fault("scale.range", fact, "leave range out, or give levels from -1 to 1")
    elif ranged and isinstance(known, tuple) and max(abs(known[0]), abs(known[-1])) > 2:
        levels = f"these levels go from {known[0]} to {known[-1]}"
        fact = f"{scale.range} puts -1 and 1 on the ends of the range, and {levels}"
        yield site.fault("scale.range", fact, "divide the levels, or use range='absmax'")
    elif scale.range == "signed_absmax" and isinstance(known, tuple) and known[0] == 0:
        fact = "signed_absmax puts its extreme on the lowest level, and that is 0"
        yield site.fault("scale.range", fact, "use range='absmax'")
    elif scale.range == "signed_absmax" and known == "calibrated":
        fact = "signed_absmax puts its extreme on the lowest level, which calibration may put anywhere"
        yield site.fault("scale.range", fact, "use range='absmax', or leave range out")


@rule("~.code.levels", "~.scale.block.channels")
def _a_law_of_coordinates_needs_several(site: Site) -> Iterator[Fault]:
    code, scale = site.store.code, site.scale
    if isinstance(code, Codebook) and code.levels == "beta" and scale is not None:
        if isinstance(scale.block.channels, int) and scale.block.channels < 4:
            fact = f"a unit vector of {scale.block.channels} channels has no such coordinates"
            yield site.fault("code.levels", fact, "use levels='normal', or blocks of more channels")


@rule("~.scale.clip", "~.scale.range", "~.scale.when")
def _a_clip_suits_its_range(site: Site) -> Iterator[Fault]:
    scale = site.scale
    if scale is None:
        return
    clips = scale.clip if isinstance(scale.clip, tuple) else (scale.clip,)
    if scale.range in ("minmax", "minmax_zero") and max(clips) > 1:
        fact = f"{max(clips)} times the range puts its ends where no number is"
        yield site.fault("scale.clip", fact, "use 1.0 or less, or range='absmax'")
    if len(clips) > 1 and scale.when == "calibrated":
        fact = "a calibrated scale is given, so there is nothing to choose"
        yield site.fault("scale.clip", fact, "give one number, or when='online'")


@rule("~.scale.quantile", "~.scale.range")
def _a_quantile_bounds_ends(site: Site) -> Iterator[Fault]:
    measured = site.store.measure
    if site.scale is not None and site.scale.quantile is not None and measured is not None:
        if measured.range in ("norm", "absmean"):
            fact = f"{measured.range} is of all numbers, and has no ends that a size would bound"
            yield site.fault("scale.quantile", fact, "use range='absmax', or leave quantile out")


@rule("~.scale.refit", "~.scale.range", "~.scale.when")
def _a_refit_is_of_one_number(site: Site) -> Iterator[Fault]:
    scale = site.scale
    if scale is None or scale.refit is None:
        return
    if scale.range in ("minmax", "minmax_zero"):
        fact = f"{scale.range} stores an offset beside the scale, and {scale.refit} fits a scale alone"
        yield site.fault("scale.refit", fact, "leave refit out, or use range='absmax'")
    elif scale.range == "signed_absmax" and scale.refit == "norm":
        fact = "signed_absmax gives the scale a sign, which a ratio of norms does not have"
        yield site.fault("scale.refit", fact, "use refit='least_squares' or range='absmax'")
    if scale.when == "calibrated":
        yield site.fault("scale.refit", "a calibrated scale is given, not fitted", "leave refit out")


@rule("~.scale.dtype", "~.scale.range", "~.scale.refit", "~.scale.scale", "~.code.levels")
def _e8m0_is_a_power_of_two(site: Site) -> Iterator[Fault]:
    scale, code = site.scale, site.store.code
    if scale is None or scale.dtype != "e8m0":
        return
    if scale.range != "absmax":
        fact = f"e8m0 is the power of two of the largest size, and cannot hold what {scale.range} finds"
        yield site.fault("scale.dtype", fact, "use range='absmax' or dtype='e4m3'")
    if scale.refit is not None:
        fact = "e8m0 is a power of two, which a fitted scale is not"
        yield site.fault("scale.refit", fact, "leave refit out, or use dtype='e4m3'")
    if scale.scale is not None:
        fact = "e8m0 reaches every size, and a second level gains nothing"
        yield site.fault("scale.scale", fact, "leave it out, or use dtype='e4m3'")
    if isinstance(code, Codebook) and code.levels == "calibrated":
        fact = "e8m0 is counted from the top level, which is not known before calibration"
        yield site.fault("scale.dtype", fact, "use dtype='e4m3'")


@rule("~.scale.exponent", "~.scale.dtype", "~.scale.when")
def _an_exponent_is_of_a_power_of_two(site: Site) -> Iterator[Fault]:
    scale = site.scale
    if scale is None or scale.exponent == "floor":
        return
    if scale.dtype != "e8m0":
        fact = f"{scale.exponent!r} says which power of two is stored, and {scale.dtype} holds other numbers"
        yield site.fault("scale.exponent", fact, "leave exponent out, or use dtype='e8m0'")
    elif scale.when == "calibrated":
        yield site.fault("scale.exponent", "a calibrated scale is given, not measured", "leave exponent out")


@rule("~.scale.floor", "~.scale.dtype", "~.scale.range", "~.scale.zero", "~.scale.refit", "~.scale.when")
def _a_floor_is_of_a_size_that_is_measured(site: Site) -> Iterator[Fault]:
    scale, measured = site.scale, site.store.measure
    if scale is None or measured is None or not scale.floor:
        return
    fact, mend = "", "leave floor out"
    if scale.when == "calibrated":
        fact = "a calibrated scale is given, not measured"
    elif scale.dtype == "e8m0":
        fact, mend = (
            "e8m0 reaches every size, and has a power of its own for zeros",
            "leave floor out, or use dtype='e4m3'",
        )
    elif measured.range not in ("absmax", "minmax") or scale.zero != "min":
        what = f"{measured.range} with zero={scale.zero!r}" if scale.zero != "min" else f"{measured.range}"
        fact, mend = (
            f"a floor is of the step of a range, not of what {what} stores",
            "leave floor out, or use range='absmax'",
        )
    elif scale.refit is not None:
        fact = f"{scale.refit} fits a second scale, which would be below it"
    elif scale.floor < 2.0 ** LEAST[scale.dtype]:
        fact, mend = (
            f"{scale.floor:g} is less than any number of {scale.dtype} but 0",
            f"use 2.0**{LEAST[scale.dtype]} or more",
        )
    if fact:
        yield site.fault("scale.floor", fact, mend)


@rule("~.scale.scale", "~.scale.block", "~.scale.when", "~.scale.zero")
def _a_second_level_is_one_number(site: Site) -> Iterator[Fault]:
    first = site.scale
    if first is None or (second := first.scale) is None:
        return
    block, place = second.block, "scale.scale"
    whole = "use per_tensor(dtype='fp32', when='calibrated')"
    if first.when == "calibrated":
        fact = "a calibrated scale takes no bytes a token, a second level saves nothing"
        yield site.fault(place, fact, "leave it out, or use when='online' for the first")
    if second.when != "calibrated":
        fact = "a second level is known before the first token, not measured online"
        yield site.fault(f"{place}.when", fact, "use when='calibrated'")
    if block.tokens is not ALL or block.channels is not ALL or block.heads not in (1, ALL):
        yield site.fault(f"{place}.block", f"a second level is one for all tokens and channels, not {block!r}", whole)
    elif block.heads == 1 and first.block.heads != 1:
        yield site.fault(f"{place}.block", "blocks over several heads need one second level for all of them", whole)
    usual_fields = (
        ("range", None),
        ("clip", 1.0),
        ("quantile", None),
        ("zero", "min"),
        ("refit", None),
        ("exponent", "floor"),
        ("floor", 0.0),
        ("scale", None),
    )
    for field, usual in usual_fields:
        if getattr(second, field) != usual:
            yield site.fault(f"{place}.{field}", f"a second level is given, {field} says nothing of it", "leave it out")
    if first.zero != "min":
        fact = f"{first.zero!r} stores an integer, which a second level would divide"
        yield site.fault("scale.zero", fact, "use zero='min'")
