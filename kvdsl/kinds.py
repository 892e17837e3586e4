"""What each field of the language may hold: types, ranges and words, checked before any rule reads the meaning."""

from __future__ import annotations

import math
import operator
import struct
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, get_args

from .codes import (
    CODES,
    Bands,
    Codebook,
    Fill,
    Float,
    FloatFormat,
    FloatRounding,
    Grid,
    Law,
    LowRank,
    Match,
    Rounding,
    Shared,
    Sketch,
    SketchBasis,
    Sparse,
    Uniform,
    Weights,
    When,
)
from .encoding import Feedback
from .errors import Fault
from .part import ALL, Part, shares
from .saying import closest, kind_of, listed, named, said
from .scale import Exponent, MetaFormat, Range, Refit, Zero
from .scheme import Block, Flush, Prefill, Recent, Scale, Scheme, Sinks, Store, TopChannels
from .tiers import Router
from .transforms import (
    Balance,
    ChannelScale,
    ChannelShift,
    Eigenbasis,
    Moment,
    Order,
    Pairs,
    Permute,
    Polar,
    PreRope,
    Rotate,
    RotateKind,
    ScaleRule,
    ShiftRule,
    Size,
)

LONGEST_BLOCK = 512  # tokens that may share a scale: a page holds whole blocks
LONGEST_WINDOW = 1 << 20
LONGEST_SOURCE = 4096  # characters
MOST_LEVELS = 16  # of a table: more are no lookup in registers any more
MOST_CLIP = 4.0
MOST_CANDIDATES = 8
LONGEST_SKETCH = 1024  # rows
MOST_RANK = 16  # vectors, and what is read of them, are operands of one product
MOST_LOOPS = 32
LEAST_FACTORED = 32  # tokens of low rank: a sub-tile is of one block
MOST_TURNS = 5  # times that radii are paired again: 32 channels are the fewest that a head has
MOST_JOINED = 16  # heads that are rotated at once: the matrix is of all their channels
NARROWEST = 32  # channels of a stretch: whole tensor-core operands of every code
WIDEST = 512
LARGEST_SEED = (1 << 31) - 1

Check = Callable[[str, Any], Iterator[Fault]]


def count(low: int, high: int, what: str, *, whole_axis: bool = False, optional: bool = False) -> Check:
    """An int in [low, high]; with `whole_axis` also ALL, with `optional` also None."""

    def check(place: str, value: Any) -> Iterator[Fault]:
        if (value is ALL and whole_axis) or (value is None and optional):
            return
        usual = f"use an int from {low} to {high}" + (", or ALL" if whole_axis else "")
        if type(value) is int:
            if value < low:
                yield Fault(place, f"{said(value)} {what} are fewer than {low}", f"use {low}" if low > 1 else usual)
            elif value > high:
                yield Fault(place, f"{said(value)} {what} are more than {high}", f"use {high}")
        elif isinstance(value, float) and 0 < value < 1:
            yield Fault(place, f"{said(value)} is a share, and only a count of {what} is meant here", usual)
        elif type(value) is not bool and (exact := _as_int(value)) is not None and low <= exact <= high:
            yield Fault(place, f"{said(value)} is {kind_of(value)}, not an int", f"use {exact}")
        else:
            yield Fault(place, f"{said(value)} is no number of {what}", usual)

    return check


def word(kind: Any, *, optional: bool = False) -> Check:
    """One of the strings of a Literal; with `optional` also None."""
    known: tuple[str, ...] = get_args(kind)

    def check(place: str, value: Any) -> Iterator[Fault]:
        if value is None and optional:
            return
        if type(value) is not str or value not in known:
            near = closest(value, known)
            mend = f"use {near!r}" if near else f"use {listed([repr(k) for k in known])}"
            yield Fault(place, f"{said(value)} is none of {', '.join(known)}", mend)

    return check


def _as_int(value: Any) -> int | None:
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    try:
        return operator.index(value)
    except TypeError:
        return None


def clip(place: str, value: Any) -> Iterator[Fault]:
    """A factor of the range, or several to choose from."""
    if not isinstance(value, tuple):
        yield from _factor(place, value)
    elif not 2 <= len(value) <= MOST_CANDIDATES:
        fact = f"{len(value)} candidates are no choice" if len(value) < 2 else f"{len(value)} candidates are too many"
        yield Fault(place, fact, f"give 2 to {MOST_CANDIDATES} of them, as (1.0, 1.5), or one number")
    else:
        for position, item in enumerate(value):
            yield from _factor(f"{place}[{position}]", item)


def _factor(place: str, value: Any) -> Iterator[Fault]:
    if type(value) not in (int, float):
        mend = f"use {float(value)!r}" if isinstance(value, float) and 0 < value <= 4 else "use a float, as 0.9"
        yield Fault(place, f"{said(value)} is {kind_of(value)}, not a float", mend)
    elif not (math.isfinite(value) and 0 < value <= MOST_CLIP):
        fact = f"{said(value)} is not in (0, {MOST_CLIP:g}]"
        yield Fault(place, fact, "use 1.0 for the whole range, or less, as 0.9")


def levels(place: str, value: Any) -> Iterator[Fault]:
    """The name of a law, or rising numbers that float16 holds."""
    if isinstance(value, str) or not isinstance(value, (tuple, list)):
        yield from word(Law)(place, value)
        return
    if not 2 <= len(value) <= MOST_LEVELS:
        fact = f"{len(value)} levels are {'fewer than 2' if len(value) < 2 else f'more than {MOST_LEVELS}'}"
        yield Fault(place, fact, "give the numbers that a code stands for, as (-1, 0, 1)")
    numbers = [item for item in value if type(item) in (int, float) and math.isfinite(item) and abs(item) <= 65504]
    if len(numbers) < len(value):
        wrong = next(item for item in value if item not in numbers)
        yield Fault(place, f"{said(wrong)} is no number within float16", "give finite numbers up to 65504")
    elif any(low >= high for low, high in zip(numbers, numbers[1:], strict=False)):
        yield Fault(place, "the levels do not rise", f"write {tuple(sorted(set(numbers)))!r}")
    else:
        yield from _told_apart(place, numbers)


def _told_apart(place: str, levels: list[float]) -> Iterator[Fault]:
    """Levels are float32 numbers; products read them in float16, over the power of two of the largest."""
    singles = [struct.unpack("<f", struct.pack("<f", level))[0] for level in levels]
    for low, high, one, other in zip(levels, levels[1:], singles, singles[1:], strict=False):
        if one == other:
            yield Fault(place, f"{said(low)} and {said(high)} are one float32 number", "leave one of them out")
    unit = 2.0 ** (math.frexp(max(map(abs, singles)))[1] - 1)
    for level, single in zip(levels, singles, strict=True):
        half = struct.unpack("<e", struct.pack("<e", single / unit))[0]
        if abs(half * unit - single) > abs(single) * 2.0**-11:
            fact = f"{said(level)} is too small for float16 beside {said(max(levels, key=abs))}"
            yield Fault(place, fact, "use 0 in its place, or levels of like sizes")


def transforms(place: str, value: Any) -> Iterator[Fault]:
    """Transforms, in the order in which they are applied."""
    check = one_of('transform=Rotate("hadamard")', PreRope, Rotate, Eigenbasis, ChannelScale, ChannelShift,
                   Permute, Polar, Balance)  # fmt: skip
    for position, item in enumerate(value if isinstance(value, tuple) else (value,)):
        here = f"{place}[{position}]" if isinstance(value, tuple) else place
        yield from check(here, item)


def stores(place: str, value: Any) -> Iterator[Fault]:
    """Stores, one for each stretch."""
    if not isinstance(value, tuple):
        yield Fault(place, f"{said(value)} is {kind_of(value)}, not a list of stores", "write Bands((Store(...), ...))")
        return
    check = one_of("Store(Codebook(2, 'angle'))", Store)
    for position, item in enumerate(value):
        yield from check(f"{place}[{position}]", item)


def stretches(place: str, value: Any) -> Iterator[Fault]:
    """Counts of channels, a multiple of NARROWEST each, or shares of a head's."""
    yield from _stretches(place, value, count(NARROWEST, WIDEST, "channels"), NARROWEST)


def rotated(place: str, value: Any) -> Iterator[Fault]:
    """A count of channels, ALL, or the sizes of several blocks."""
    whole_axis = not isinstance(value, tuple)
    each = count(2, 256, "channels", whole_axis=whole_axis)
    yield from each(place, value) if whole_axis else _stretches(place, value, each, 1)


def _stretches(place: str, value: Any, check: Check, least: int) -> Iterator[Fault]:
    """Counts of channels, a multiple of `least` each, or shares of a head's that are all of it."""
    if not isinstance(value, tuple):
        yield Fault(place, f"{said(value)} is {kind_of(value)}, not a list of counts", "write channels=(512, 64)")
        return
    if value and all(isinstance(item, float) for item in value):
        found = [f for i, one in enumerate(value) for f in share("channels", 1, "0.25")(f"{place}[{i}]", one)]
        yield from found
        if not found and (all_of := sum(shares(value))) != 1:
            fact = f"{' and '.join(map(str, value))} are {float(all_of):g} of a head together"
            yield Fault(place, fact, "give shares of all its channels, as (0.25, 0.5, 0.25)")
        return
    for position, item in enumerate(value):
        yield from (found := [*check(f"{place}[{position}]", item)])
        if not found and item % least:
            fact = f"{item} channels are no multiple of {least}"
            yield Fault(f"{place}[{position}]", fact, f"use {round(item / least) * least or least}")


def portion(place: str, value: Any, *, whole_axis: bool = False) -> Iterator[Fault]:
    """A count of channels, or a share of a head's; with `whole_axis` also ALL."""
    whole = count(1, 248, "channels", whole_axis=whole_axis)
    yield from (share("channels", 1, "0.125, or a count, as 8") if isinstance(value, float) else whole)(place, value)


def share(what: str, most: float, example: str, *, optional: bool = False) -> Check:
    """A float below `most`; with `optional` also None."""

    def check(place: str, value: Any) -> Iterator[Fault]:
        if value is None and optional:
            return
        if type(value) is not float or not 0 < value < most:
            yield Fault(place, f"{said(value)} is no share of {what}", f"use a share below {most}, as {example}")

    return check


def flag(place: str, value: Any) -> Iterator[Fault]:
    """True or False."""
    if not isinstance(value, bool):
        yield Fault(place, f"{said(value)} is {kind_of(value)}, not a bool", "use True or False")


def text(place: str, value: Any) -> Iterator[Fault]:
    """A str that a file can hold."""
    if not isinstance(value, str):
        yield Fault(
            place, f"{said(value)} is {kind_of(value)}, not a str", 'write source="arXiv 2402.02750, section 3"'
        )
        return
    if len(value) > LONGEST_SOURCE:
        fact = f"{len(value)} characters are more than {LONGEST_SOURCE}"
        yield Fault(place, fact, "name the source, do not quote it")
    try:
        value.encode()
    except UnicodeEncodeError:
        yield Fault(place, f"{said(value)} holds half a surrogate pair, which no file can", "remove it")


def one_of(example: str, *kinds: type[Part], optional: bool = False) -> Check:
    """A part of one of these types; with `optional` also None."""
    names = listed([named(k) for k in kinds])

    def check(place: str, value: Any) -> Iterator[Fault]:
        if isinstance(value, kinds) or (value is None and optional):
            return
        if value is None and kinds == (Store,):
            yield Fault(place, "missing", "write keys=Store(...) and values=Store(...), or both=Store(...)")
        elif isinstance(value, type):
            yield Fault(place, f"{value.__name__} is the class itself, not a value of it", f"write {example}")
        else:
            yield Fault(place, f"{said(value)} is {kind_of(value)}, not {names}", f"write {example}")

    return check


_store = one_of("Store(Uniform(bits=4), scale=per_token())", Store)

KINDS: dict[type[Part], dict[str, Check]] = {
    Block: {
        "tokens": count(1, LONGEST_BLOCK, "tokens", whole_axis=True),
        "channels": count(1, 256, "channels", whole_axis=True),
        "heads": count(1, 1024, "kv heads", whole_axis=True),
    },
    Scale: {
        "block": one_of("Block(tokens=1, channels=32), or per_token(channels=32) for the scale", Block),
        "range": word(Range, optional=True),
        "clip": clip,
        "quantile": share("a block's numbers", 1, "0.96", optional=True),
        "zero": word(Zero),
        "refit": word(Refit, optional=True),
        "dtype": word(MetaFormat),
        "exponent": word(Exponent),
        "scale": one_of('per_tensor(dtype="fp32", when="calibrated")', Scale, optional=True),
        "when": word(When),
    },
    Uniform: {
        "bits": count(1, 8, "bits", optional=True),
        "levels": count(2, 256, "levels", optional=True),
        "grid": word(Grid),
        "rounding": word(Rounding),
    },
    Float: {"format": word(FloatFormat), "rounding": word(FloatRounding)},
    Codebook: {
        "bits": count(1, 4, "bits", optional=True),
        "levels": levels,
        "weights": word(Weights, optional=True),
        "match": word(Match, optional=True),
    },
    Sketch: {
        "dim": count(8, LONGEST_SKETCH, "rows", whole_axis=True),
        "basis": word(SketchBasis),
        "seed": count(0, LARGEST_SEED, "seed"),
    },
    LowRank: {
        "rank": count(1, MOST_RANK, "vectors"),
        "tokens": count(LEAST_FACTORED, LONGEST_BLOCK, "tokens"),
        "loops": count(1, MOST_LOOPS, "loops"),
        "seed": count(0, LARGEST_SEED, "seed"),
    },
    Sparse: {
        "share": share("a line's numbers", 0.5, "0.01"),
        "line": one_of("Block() for a token's channels, or Block(64, 1) for a channel's tokens", Block),
        "slots": count(1, 32, "slots"),
        "fill": word(Fill),
        "when": word(When),
    },
    PreRope: {"interleaved": flag},
    Rotate: {
        "kind": word(RotateKind),
        "size": rotated,
        "heads": count(1, MOST_JOINED, "kv heads"),
        "seed": count(0, LARGEST_SEED, "seed", optional=True),
    },
    Eigenbasis: {
        "by": word(Moment),
        "per": word(Literal["head", "layer"]),
        "when": word(Literal["calibrated"]),
        "rank": partial(portion, whole_axis=True),
    },  # fmt: skip
    ChannelScale: {"by": word(ScaleRule), "when": word(Literal["calibrated", "online", "prompt", "arrived"])},
    ChannelShift: {"by": word(ShiftRule), "when": word(Literal["calibrated"])},
    Permute: {"by": word(Order), "pairs": word(Pairs, optional=True), "when": word(Literal["calibrated"])},
    Polar: {"levels": count(1, MOST_TURNS, "levels")},
    Bands: {"stores": stores, "channels": stretches},
    Shared: {},
    Store: {
        "code": one_of("Uniform(bits=4) or Float('fp16')", *CODES),
        "scale": one_of("scale=per_token(channels=32)", Scale, optional=True),
        "transform": transforms,
        "outliers": one_of("outliers=TopChannels(8, store=Store(...))", TopChannels, Sparse, optional=True),
        "residual": one_of("residual=Sketch(basis='gaussian')", Store, optional=True),
        "feedback": one_of("feedback=Feedback()", Feedback, optional=True),
    },
    TopChannels: {
        "n": portion,
        "per": count(1, LONGEST_BLOCK, "tokens", whole_axis=True),
        "by": word(Size),
        "store": _store,
        "when": word(When, optional=True),
    },
    Recent: {"tokens": count(1, LONGEST_WINDOW, "tokens"), "flush": word(Flush)},
    Sinks: {"tokens": count(1, LONGEST_WINDOW, "tokens")},
    Scheme: {
        "keys": _store,
        "values": _store,
        "sinks": one_of("sinks=Sinks(4)", Sinks, optional=True),
        "recent": one_of("recent=Recent(128)", Recent, optional=True),
        "prefill": word(Prefill),
        "source": text,
    },
}


def misfits(part: Part, path: str = "") -> Iterator[Fault]:
    """The faults of every field of this part and of the parts inside it."""
    for field, check in ({} if _own(part) else KINDS[type(part)]).items():
        value = getattr(part, field)
        place = f"{path}.{field}".lstrip(".")
        found = tuple(check(place, value))
        yield from found
        if found:
            continue
        if isinstance(value, Part):
            yield from misfits(value, place)
        elif field in ("transform", "stores", "tiers"):
            for position, item in enumerate(value):
                yield from misfits(item, f"{place}[{position}]")


def _own(part: Part) -> bool:
    """Whether the part is a router of a user's: its class checks its fields itself."""
    return isinstance(part, Router) and type(part) not in KINDS
