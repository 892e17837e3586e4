"""What is refused of tables, small floats, second fits, searches and second levels, and in which words."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvdsl.errors import SchemeError
from kvdsl.scheme import (
    ALL,
    Block,
    Codebook,
    Float,
    Scale,
    Scheme,
    Store,
    Uniform,
    per_channel,
    per_tensor,
    per_token,
)

SECOND = per_tensor(dtype="fp32", when="calibrated")


def keys(code: object, scale: Scale | None = None, **kept: object) -> Scheme:
    return Scheme(keys=Store(code, scale=scale, **kept), values=Store())  # type: ignore[arg-type]


FAULTY: list[tuple[Callable[[], Scheme], str]] = [
    (
        lambda: keys(Codebook(4)),
        "keys.scale: the levels of a table need a scale; say what shares one, as scale=per_token()",
    ),
    (
        lambda: keys(Float("e2m1")),
        "keys.scale: e2m1 ends at 6 and needs a scale; "
        "say what shares one, as scale=per_token(channels=32, dtype='e8m0')",
    ),
    (
        lambda: keys(Float("fp32"), per_token()),
        "keys.scale: fp32 holds the number itself and takes no scale; leave scale out, or use Uniform(bits=4)",
    ),
    (
        lambda: keys(Codebook(levels="normal"), per_token()),
        "keys.code.bits: no bits; write Codebook(bits=4, levels='normal')",
    ),
    (
        lambda: keys(Codebook(1, (-1, 0, 1)), per_token()),
        "keys.code.levels: 3 levels do not fit 1 bits; leave bits out, or use bits=2",
    ),
    (
        lambda: keys(Codebook(2, (1, 0)), per_token()),
        "keys.code.levels: the levels do not rise; write (0, 1)",
    ),
    (
        lambda: keys(Codebook(levels=(1.0, 1.000000001)), per_token(range="absmax")),
        "keys.code.levels: 1.0 and 1.000000001 are one float32 number; leave one of them out",
    ),
    (
        lambda: keys(Codebook(levels=(-65504, 0, 2.0**-12, 1)), per_token(range="absmax")),
        "keys.code.levels: 0.000244140625 is too small for float16 beside -65504; "
        "use 0 in its place, or levels of like sizes",
    ),
    (
        lambda: keys(Codebook(4), per_token(range="minmax")),
        "keys.scale.range: minmax puts -1 and 1 on the ends of the range, and levels for 'normal' lie otherwise; "
        "leave range out, or give levels from -1 to 1",
    ),
    (
        lambda: keys(Codebook(levels=(-8, 0, 7)), per_token(range="minmax_zero")),
        "keys.scale.range: minmax_zero puts -1 and 1 on the ends of the range, and these levels go from -8 to 7; "
        "divide the levels, or use range='absmax'",
    ),
    (
        lambda: keys(Codebook(levels=(0, 1)), per_token(range="signed_absmax")),
        "keys.scale.range: signed_absmax puts its extreme on the lowest level, and that is 0; use range='absmax'",
    ),
    (
        lambda: keys(Codebook(4, "calibrated"), per_token(range="signed_absmax")),
        "keys.scale.range: signed_absmax puts its extreme on the lowest level, which calibration may put anywhere; "
        "use range='absmax', or leave range out",
    ),
    (
        lambda: keys(Float("e4m3"), per_token(range="minmax")),
        "keys.scale.range: the numbers of e4m3 lie about 0 alike on both sides, minmax about another middle; "
        "leave range out",
    ),
    (
        lambda: keys(Float("e5m2"), per_token(range="signed_absmax")),
        "keys.scale.range: the numbers of e5m2 lie about 0 alike on both sides, signed_absmax about another middle; "
        "leave range out",
    ),
    (
        lambda: keys(Uniform(4), per_token(range="norm")),
        "keys.scale.range: evenly spaced levels end where the range ends, and norm has no ends; "
        "use range='absmax', or Codebook(levels=(-1, 0, 1))",
    ),
    (
        lambda: keys(Codebook(2, "beta"), per_token(channels=2)),
        "keys.code.levels: a unit vector of 2 channels has no such coordinates; "
        "use levels='normal', or blocks of more channels",
    ),
    (
        lambda: keys(Codebook(4, weights="fisher"), per_token()),
        "keys.code.weights: 'fisher' weighs the data that a table is fitted to, and levels='normal' is fitted to none; "
        "leave weights out, or use levels='calibrated'",
    ),
    (
        lambda: keys(Codebook(2, "calibrated", weights="hessian"), per_token()),  # type: ignore[arg-type]
        "keys.code.weights: 'hessian' is none of fisher; use 'fisher'",
    ),
    (
        lambda: keys(Codebook(2, (-1, 1), match="moments"), per_token()),
        "keys.code.match: 'moments' are those of the data that a table is fitted to, and levels=(-1, 1) is fitted to "
        "none; leave match out, or use levels='calibrated'",
    ),
    (
        lambda: keys(Codebook(2, "calibrated", match="moments"), per_token(range="absmax", refit="norm")),
        "keys.scale.refit: norm fits the scale to the decoded levels once more, and their moments match no longer; "
        "leave refit out, or match",
    ),
    (
        lambda: keys(Codebook(4, "calibrated"), per_token(zero="point")),
        "keys.scale.zero: an integer zero point counts levels that are evenly spaced, those of a table are not: "
        "'point'; leave zero out",
    ),
    (
        lambda: keys(Uniform(4), per_token(zero="in_scale", dtype="e4m3")),
        "keys.scale.zero: a zero point inside the scale needs the spare bits of fp32, not e4m3; "
        "use dtype='fp32' or zero='point'",
    ),
    (
        lambda: keys(Uniform(4), per_token(zero="point", dtype="e4m3")),
        "keys.scale.zero: an integer zero point beyond 16 is not one of e4m3; use zero='min' or dtype='fp16'",
    ),
    (
        lambda: keys(Uniform(4), per_token(clip=(0.8, 1.2))),
        "keys.scale.clip: 1.2 times the range puts its ends where no number is; use 1.0 or less, or range='absmax'",
    ),
    (
        lambda: keys(Uniform(4), per_token(range="absmax", clip=(1.0,))),
        "keys.scale.clip: 1 candidates are no choice; give 2 to 8 of them, as (1.0, 1.5), or one number",
    ),
    (
        lambda: keys(Uniform(4), per_tensor(range="absmax", clip=(1.0, 0.9), when="calibrated")),
        "keys.scale.clip: a calibrated scale is given, so there is nothing to choose; "
        "give one number, or when='online'",
    ),
    (
        lambda: keys(Uniform(4), per_token(refit="least_squares")),
        "keys.scale.refit: minmax stores an offset beside the scale, and least_squares fits a scale alone; "
        "leave refit out, or use range='absmax'",
    ),
    (
        lambda: keys(Uniform(4), per_token(range="signed_absmax", refit="norm")),
        "keys.scale.refit: signed_absmax gives the scale a sign, which a ratio of norms does not have; "
        "use refit='least_squares' or range='absmax'",
    ),
    (
        lambda: keys(Uniform(4), per_tensor(range="absmax", refit="norm", when="calibrated")),
        "keys.scale.refit: a calibrated scale is given, not fitted; leave refit out",
    ),
    (
        lambda: keys(Uniform(4), per_token(dtype="e8m0")),
        "keys.scale.dtype: e8m0 is the power of two of the largest size, and cannot hold what minmax finds; "
        "use range='absmax' or dtype='e4m3'",
    ),
    (
        lambda: keys(Float("e2m1"), per_token(dtype="e8m0", refit="least_squares")),
        "keys.scale.refit: e8m0 is a power of two, which a fitted scale is not; leave refit out, or use dtype='e4m3'",
    ),
    (
        lambda: keys(Float("e2m1"), per_token(dtype="e4m3", exponent="ceil")),
        "keys.scale.exponent: 'ceil' says which power of two is stored, and e4m3 holds other numbers; "
        "leave exponent out, or use dtype='e8m0'",
    ),
    (
        lambda: keys(Float("e2m1"), per_tensor(dtype="e8m0", exponent="ceil", when="calibrated")),
        "keys.scale.exponent: a calibrated scale is given, not measured; leave exponent out",
    ),
    (
        lambda: keys(Float("e2m1"), per_token(dtype="e4m3", floor=2.0**-10)),
        "keys.scale.floor: 0.000976562 is less than any number of e4m3 but 0; use 2.0**-9 or more",
    ),
    (
        lambda: keys(Codebook(4, "normal"), per_token(floor=0.5)),
        "keys.scale.floor: a floor is of the step of a range, not of what norm stores; "
        "leave floor out, or use range='absmax'",
    ),
    (
        lambda: keys(Float("e2m1"), per_token(dtype="e8m0", floor=0.5)),
        "keys.scale.floor: e8m0 reaches every size, and has a power of its own for zeros; "
        "leave floor out, or use dtype='e4m3'",
    ),
    (
        lambda: keys(Float("e2m1"), per_token(refit="least_squares", floor=0.5)),
        "keys.scale.floor: least_squares fits a second scale, which would be below it; leave floor out",
    ),
    (
        lambda: keys(Uniform(4), per_tensor(when="calibrated", floor=0.5)),
        "keys.scale.floor: a calibrated scale is given, not measured; leave floor out",
    ),
    (
        lambda: keys(Uniform(4), per_token(floor=-1.0)),
        "keys.scale.floor: -1.0 is no number that scales would be no less than; "
        "use a float up to 1, as 2.0**-9, or 0.0 for none",
    ),
    (
        lambda: keys(Float("fp16", rounding="away"), None),
        "keys.code.rounding: fp16 is rounded as a processor does, to even, and not 'away'; "
        "leave rounding out, or use a small float, as Float('e4m3')",
    ),
    (
        lambda: keys(Float("e2m1"), per_token(dtype="e8m0", scale=SECOND)),
        "keys.scale.scale: e8m0 reaches every size, and a second level gains nothing; "
        "leave it out, or use dtype='e4m3'",
    ),
    (
        lambda: keys(Codebook(4, "calibrated"), per_token(range="absmax", dtype="e8m0")),
        "keys.scale.dtype: e8m0 is counted from the top level, which is not known before calibration; use dtype='e4m3'",
    ),
    (
        lambda: keys(Float("e2m1"), per_token(dtype="e4m3", scale=per_tensor())),
        "keys.scale.scale.when: a second level is known before the first token, not measured online; "
        "use when='calibrated'",
    ),
    (
        lambda: keys(Float("e2m1"), per_tensor(when="calibrated", scale=SECOND)),
        "keys.scale.scale: a calibrated scale takes no bytes a token, a second level saves nothing; "
        "leave it out, or use when='online' for the first",
    ),
    (
        lambda: keys(Float("e2m1"), per_token(dtype="e4m3", scale=per_channel(when="calibrated"))),
        "keys.scale.scale.block: a second level is one for all tokens and channels, not "
        "Block(ALL, channels=1); use per_tensor(dtype='fp32', when='calibrated')",
    ),
    (
        lambda: keys(Uniform(4), per_token(heads=2, scale=Scale(Block(ALL, ALL), when="calibrated"))),
        "keys.scale.scale.block: blocks over several heads need one second level for all of them; "
        "use per_tensor(dtype='fp32', when='calibrated')",
    ),
    (
        lambda: keys(Uniform(4), per_token(scale=SECOND.with_(refit="norm"))),
        "keys.scale.scale.refit: a second level is given, refit says nothing of it; leave it out",
    ),
    (
        lambda: keys(Uniform(4), per_token(zero="point", scale=SECOND)),
        "keys.scale.zero: 'point' stores an integer, which a second level would divide; use zero='min'",
    ),
]


@pytest.mark.parametrize(("build", "sentence"), FAULTY, ids=[sentence.partition(";")[0] for _, sentence in FAULTY])
def test_a_faulty_measure_is_refused_in_these_words(build: Callable[[], Scheme], sentence: str) -> None:
    with pytest.raises(SchemeError) as caught:
        build()
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    "store",
    [
        Store(Codebook(levels=(-1, 0, 1)), scale=per_token(range="absmean", clip=1.4, refit="least_squares")),
        Store(Float("e4m3")),
        Store(Float("e5m2"), scale=per_token(range="norm", dtype="bf16")),
        Store(Float("e2m1"), scale=per_token(channels=16, clip=(1.0, 1.5), dtype="e4m3", scale=SECOND)),
        Store(Codebook(3, "beta"), scale=per_token(refit="norm")),
        Store(Codebook(levels=(-1e-30, 0, 2e-30)), scale=per_token(range="absmax")),
        Store(Codebook(4, "calibrated"), scale=per_tensor(when="calibrated")),
        Store(Codebook(2, "calibrated", weights="fisher"), scale=per_token()),
        Store(Codebook(2, "calibrated", match="moments"), scale=per_token(range="absmax", clip=(1.0, 0.9))),
        Store(Uniform(4, rounding="away"), scale=per_token(range="absmax", clip=1.2, dtype="e8m0")),
    ],
    ids=str,
)
def test_what_is_meaningful_is_legal(store: Store) -> None:
    assert Scheme(both=store).keys == store
