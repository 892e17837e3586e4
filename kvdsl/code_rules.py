"""What is legal of a code: its bits and levels, and the scale and zero point that they go with."""

from __future__ import annotations

from collections.abc import Iterator

from .codes import in_trits, width
from .errors import Fault
from .scheme import Codebook, Float, Scale, Uniform
from .sites import Site, rule


def _levels(code: Uniform, scale: Scale) -> int:
    """The number of levels that the code has under this scale."""
    if code.levels is not None:
        return code.levels
    assert code.bits is not None
    return 2**code.bits - (scale.range == "absmax" and code.grid == "ends")


@rule("~.code", "~.scale")
def _levels_need_a_scale(site: Site) -> Iterator[Fault]:
    if isinstance(site.store.code, Uniform) and site.scale is None:
        yield site.fault(
            "scale",
            "evenly spaced levels need a scale",
            "say what shares one, as scale=per_token(channels=32)",
        )
    elif isinstance(site.store.code, Codebook) and site.store.code.levels != "angle" and site.scale is None:
        yield site.fault("scale", "the levels of a table need a scale", "say what shares one, as scale=per_token()")
    elif isinstance(site.store.code, Float) and site.store.code.format == "e2m1" and site.scale is None:
        mend = "say what shares one, as scale=per_token(channels=32, dtype='e8m0')"
        yield site.fault("scale", "e2m1 ends at 6 and needs a scale", mend)
    elif isinstance(site.store.code, Float) and site.store.code.plain and site.scale is not None:
        fact = f"{site.store.code.format} holds the number itself and takes no scale"
        yield site.fault("scale", fact, "leave scale out, or use Uniform(bits=4)")


@rule("~.code.format", "~.code.rounding")
def _plain_numbers_are_rounded_to_even(site: Site) -> Iterator[Fault]:
    code = site.store.code
    if isinstance(code, Float) and code.plain and code.rounding != "even":
        fact = f"{code.format} is rounded as a processor does, to even, and not {code.rounding!r}"
        yield site.fault("code.rounding", fact, "leave rounding out, or use a small float, as Float('e4m3')")


@rule("~.code.bits", "~.code.levels")
def _levels_fit_their_bits(site: Site) -> Iterator[Fault]:
    code = site.store.code
    if isinstance(code, Codebook):
        yield from _table_fits_its_bits(site, code)
        return
    if not isinstance(code, Uniform) or in_trits(code):
        return
    if code.bits is None:
        levels = f", levels={code.levels}" if code.levels else ""
        yield site.fault("code.bits", "no bits", f"write Uniform(bits={_bits(code.levels or 16)}{levels})")
    elif code.levels is not None and code.levels > 2**code.bits:
        fact = f"{code.levels} levels do not fit {code.bits} bits"
        yield site.fault("code.levels", fact, f"use bits={_bits(code.levels)} or levels={2**code.bits}")


def _table_fits_its_bits(site: Site, code: Codebook) -> Iterator[Fault]:
    if not isinstance(code.levels, tuple):
        if code.bits is None:
            yield site.fault("code.bits", "no bits", f"write Codebook(bits=4, levels={code.levels!r})")
    elif code.bits is not None and len(code.levels) > 2**code.bits:
        fact = f"{len(code.levels)} levels do not fit {code.bits} bits"
        yield site.fault("code.levels", fact, f"leave bits out, or use bits={_bits(len(code.levels))}")


@rule("~.code.levels", "~.code.weights")
def _weights_are_of_data(site: Site) -> Iterator[Fault]:
    code = site.store.code
    if isinstance(code, Codebook) and code.weights is not None and code.levels != "calibrated":
        fact = (
            f"{code.weights!r} weighs the data that a table is fitted to, and levels={code.levels!r} is fitted to none"
        )
        yield site.fault("code.weights", fact, "leave weights out, or use levels='calibrated'")


@rule("~.code.levels", "~.code.match", "~.scale.refit")
def _levels_match_data(site: Site) -> Iterator[Fault]:
    code, scale = site.store.code, site.scale
    if not isinstance(code, Codebook) or code.match is None:
        return
    if code.levels != "calibrated":
        what = f"levels={code.levels!r} is fitted to none"
        fact = f"{code.match!r} are those of the data that a table is fitted to, and {what}"
        yield site.fault("code.match", fact, "leave match out, or use levels='calibrated'")
    if scale is not None and scale.refit is not None:
        fact = f"{scale.refit} fits the scale to the decoded levels once more, and their {code.match} match no longer"
        yield site.fault("scale.refit", fact, "leave refit out, or match")


def _bits(levels: int) -> int:
    return max(1, (levels - 1).bit_length())


@rule("~.code", "~.scale.range")
def _symmetric_levels_have_a_middle(site: Site) -> Iterator[Fault]:
    code, scale = site.store.code, site.scale
    if (
        not isinstance(code, Uniform)
        or scale is None
        or width(code) is None
        or scale.range not in ("absmax", "signed_absmax")
    ):
        return
    at, levels = "code.levels" if code.levels else "code.bits", _levels(code, scale)
    if scale.range == "signed_absmax" and code.grid != "ends":
        fact = f"signed_absmax puts its extreme on a level, and grid {code.grid!r} has none there"
        yield site.fault("code.grid", fact, "use grid='ends' or range='absmax'")
    elif scale.range == "absmax" and code.grid == "ends":
        if levels < 3:
            fact = f"{levels} level{'s' * (levels > 1)} cannot be 0 and both its sides, as absmax asks on grid 'ends'"
            yield site.fault(
                at, fact, "use levels=3 and bits=2, or grid='cells'" if code.levels else "use bits=2 or grid='cells'"
            )
    elif levels % 2:
        fact = f"{levels} levels have one in the middle, and {scale.range} on grid {code.grid!r} needs an even number"
        other = f" or {levels + 1}" if code.bits is None or levels < 2**code.bits else ""
        yield site.fault(at, fact, f"use {'bits=2 and ' * (code.bits is None)}levels={levels - 1}{other}")


@rule("~.code.grid", "~.code.rounding")
def _cells_round_down(site: Site) -> Iterator[Fault]:
    code = site.store.code
    if isinstance(code, Uniform) and code.grid == "cells" and code.rounding != "even":
        fact = f"the cell that a number lies in is its code, {code.rounding!r} has nothing to round"
        yield site.fault("code.rounding", fact, "leave rounding out, or use grid='ends'")


@rule("~.scale.zero", "~.scale.range", "~.code")
def _a_zero_point_belongs_to_a_minimum(site: Site) -> Iterator[Fault]:
    code, scale = site.store.code, site.scale
    if scale is None or scale.zero == "min":
        return
    if scale.range not in ("minmax", "minmax_zero"):
        fact = f"{scale.range} is centred on 0 and has no offset to store as {scale.zero!r}"
        yield site.fault("scale.zero", fact, "leave zero out, or use range='minmax'")
    elif isinstance(code, Codebook):
        fact = f"an integer zero point counts levels that are evenly spaced, those of a table are not: {scale.zero!r}"
        yield site.fault("scale.zero", fact, "leave zero out")
    elif isinstance(code, Uniform) and code.grid != "ends":
        fact = f"an integer zero point lies on a level, and grid {code.grid!r} puts 0 between two"
        yield site.fault("scale.zero", fact, "use zero='min' or grid='ends'")


@rule("~.scale.zero", "~.code")
def _a_zero_point_takes_the_nearest_level(site: Site) -> Iterator[Fault]:
    code, scale = site.store.code, site.scale
    if isinstance(code, Uniform) and code.rounding == "floor" and scale is not None and scale.zero == "point":
        fact = "rounded down over a scale that was rounded up, a block of one number beside its zero point decodes to 0"
        yield site.fault("code.rounding", fact, "use rounding='even' or zero='min'")


@rule("~.scale.zero", "~.scale.dtype")
def _a_zero_point_in_the_scale_needs_spare_bits(site: Site) -> Iterator[Fault]:
    scale = site.scale
    if scale is not None and scale.zero_inside and scale.dtype != "fp32":
        fact = f"a zero point inside the scale needs the spare bits of fp32, not {scale.dtype}"
        yield site.fault("scale.zero", fact, "use dtype='fp32' or zero='point'")
    if scale is not None and scale.zero == "point" and scale.dtype == "e4m3":
        fact = "an integer zero point beyond 16 is not one of e4m3"
        yield site.fault("scale.zero", fact, "use zero='min' or dtype='fp16'")
