"""What each field of the language may hold: types, ranges and words, checked before any rule reads the meaning."""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_args

from .errors import Fault
from .scheme import (
    ALL,
    Block,
    Float,
    FloatFormat,
    Flush,
    Grid,
    MetaFormat,
    Part,
    Prefill,
    Range,
    Recent,
    Rounding,
    Scale,
    Scheme,
    Sinks,
    Store,
    Uniform,
    When,
    Zero,
)

LONGEST_BLOCK = 512  # tokens that may share a scale: a page holds whole blocks
LONGEST_WINDOW = 1 << 20
LONGEST_SOURCE = 4096  # characters
MOST_LAYERS = 4096

Check = Callable[[str, Any], Iterator[Fault]]


def said(value: Any, most: int = 60) -> str:
    """repr for a message: short, and never raising (an int of 5000 digits refuses to be printed)."""
    try:
        text = repr(value)
    except Exception:
        digits = f" of about {int(value.bit_length() * 0.30103)} digits" if isinstance(value, int) else ""
        text = f"<{type(value).__name__}{digits}>"
    return text if len(text) <= most else text[: most - 3] + "..."


def closest(word: Any, known: Sequence[str]) -> str | None:
    """The known name that looks most like `word`, if any does."""
    if not isinstance(word, str):
        return None
    lower = word[:100].lower()
    near = difflib.get_close_matches(lower, known, 1, 0.5) or [k for k in known if lower and k.startswith(lower)]
    return near[0] if near else None


def listed(words: Sequence[str]) -> str:
    """`a, b or c`."""
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


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
            yield Fault(place, f"{said(value)} is {_type(value)}, not an int", f"use {exact}")
        else:
            yield Fault(place, f"{said(value)} is no number of {what}", usual)

    return check


def _as_int(value: Any) -> int | None:
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _type(value: Any) -> str:
    return "nothing" if value is None else _named(type(value))


def _named(kind: type) -> str:
    own = kind.__module__ in ("builtins", Part.__module__)
    name = kind.__name__ if own else f"{kind.__module__}.{kind.__name__}"
    return f"an {name}" if name[0] in "aeiouAEIO" else f"a {name}"


def word(kind: Any) -> Check:
    """One of the strings of a Literal."""
    known: tuple[str, ...] = get_args(kind)

    def check(place: str, value: Any) -> Iterator[Fault]:
        if type(value) is not str or value not in known:
            near = closest(value, known)
            mend = f"use {near!r}" if near else f"use {listed([repr(k) for k in known])}"
            yield Fault(place, f"{said(value)} is none of {', '.join(known)}", mend)

    return check


def fraction(place: str, value: Any) -> Iterator[Fault]:
    """A finite number in (0, 1]."""
    if type(value) not in (int, float):
        mend = f"use {float(value)!r}" if isinstance(value, float) and 0 < value <= 1 else "use a float, as 0.9"
        yield Fault(place, f"{said(value)} is {_type(value)}, not a float", mend)
    elif not (math.isfinite(value) and 0 < value <= 1):
        yield Fault(place, f"{said(value)} is not in (0, 1]", "use 1.0 for the whole range, or less, as 0.9")


def text(place: str, value: Any) -> Iterator[Fault]:
    """A str that a file can hold."""
    if not isinstance(value, str):
        yield Fault(place, f"{said(value)} is {_type(value)}, not a str", 'write source="arXiv 2402.02750, section 3"')
        return
    if len(value) > LONGEST_SOURCE:
        yield Fault(
            place, f"{len(value)} characters are more than {LONGEST_SOURCE}", "name the source, do not quote it"
        )
    try:
        value.encode()
    except UnicodeEncodeError:
        yield Fault(place, f"{said(value)} holds half a surrogate pair, which no file can", "remove it")


def one_of(example: str, *kinds: type[Part], optional: bool = False) -> Check:
    """A part of one of these types; with `optional` also None."""
    names = listed([_named(k) for k in kinds])

    def check(place: str, value: Any) -> Iterator[Fault]:
        if isinstance(value, kinds) or (value is None and optional):
            return
        if value is None and kinds == (Store,):
            yield Fault(place, "missing", "write keys=Store(...) and values=Store(...), or both=Store(...)")
        elif isinstance(value, type):
            yield Fault(place, f"{value.__name__} is the class itself, not a value of it", f"write {example}")
        else:
            yield Fault(place, f"{said(value)} is {_type(value)}, not {names}", f"write {example}")

    return check


def table(place: str, value: Any) -> Iterator[Fault]:
    """Pairs of layer indices and the scheme of those layers."""
    if not isinstance(value, tuple) or not all(isinstance(row, tuple) and len(row) == 2 for row in value):
        yield Fault(place, f"{said(value)} is no table of layers", "write layers={0: fp16, range(1, 4): kivi4}")
        return
    for key, scheme in value:
        here = f"{place}[{said(key[0], 20) if len(key) == 1 else said(key, 20)}]"
        if not key:
            yield Fault(here, "names no layer", "write layers={0: fp16}")
        for index in key:
            if type(index) is not int or not -MOST_LAYERS <= index < MOST_LAYERS:
                yield Fault(here, f"{said(index)} is no layer index", "use an int, as 0, or -1 for the last layer")
        if not isinstance(scheme, Scheme):
            yield Fault(here, f"{said(scheme)} is {_type(scheme)}, not a Scheme", "write layers={0: fp16}")


_store = one_of("Store(Uniform(bits=4), scale=per_token())", Store)

KINDS: dict[type[Part], dict[str, Check]] = {
    Block: {
        "tokens": count(1, LONGEST_BLOCK, "tokens", whole_axis=True),
        "channels": count(1, 256, "channels", whole_axis=True),
        "heads": count(1, 1024, "kv heads", whole_axis=True),
    },
    Scale: {
        "block": one_of("Block(tokens=1, channels=32), or per_token(channels=32) for the scale", Block),
        "range": word(Range),
        "clip": fraction,
        "zero": word(Zero),
        "dtype": word(MetaFormat),
        "when": word(When),
    },
    Uniform: {
        "bits": count(1, 8, "bits", optional=True),
        "levels": count(2, 256, "levels", optional=True),
        "grid": word(Grid),
        "rounding": word(Rounding),
    },
    Float: {"format": word(FloatFormat)},
    Store: {
        "code": one_of("Uniform(bits=4) or Float('fp16')", Uniform, Float),
        "scale": one_of("scale=per_token(channels=32)", Scale, optional=True),
    },
    Recent: {"tokens": count(1, LONGEST_WINDOW, "tokens"), "flush": word(Flush)},
    Sinks: {"tokens": count(1, LONGEST_WINDOW, "tokens")},
    Scheme: {
        "keys": _store,
        "values": _store,
        "sinks": one_of("sinks=Sinks(4)", Sinks, optional=True),
        "recent": one_of("recent=Recent(128)", Recent, optional=True),
        "prefill": word(Prefill),
        "layers": table,
        "source": text,
    },
}


def misfits(part: Part, path: str = "") -> Iterator[Fault]:
    """The faults of every field of this part and of the parts inside it."""
    for field, check in KINDS[type(part)].items():
        value = getattr(part, field)
        place = f"{path}.{field}".lstrip(".")
        found = tuple(check(place, value))
        yield from found
        if isinstance(value, Part) and not found:
            yield from misfits(value, place)
