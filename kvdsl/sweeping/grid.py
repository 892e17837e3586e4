"""A grid of schemes: one or more to begin with, and axes, which are places of a spec with the values they take.

    base = "kivi2"
    beside = ["quarot2"]

    [axes]
    bits = [2, 3, 4]
    keys.scale.tokens = [32, 64]
    values.transform = ["none", "hadamard"]
    recent = [0, 128]

Every combination is a member, but for those that a rule refuses: these are told with the rule's sentence.
"""

from __future__ import annotations

import itertools
import random
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from kvdsl.errors import SchemeError
from kvdsl.part import Part
from kvdsl.registry import load, name_of
from kvdsl.saying import closest
from kvdsl.scheme import Scheme

from .words import value

MOST = 10_000  # combinations: more are hardly meant
_FIELDS = ("base", "beside", "axes")
Choice = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Member:
    """A scheme of a grid; axes: what it takes at each of its places, in words."""

    name: str
    scheme: Scheme
    axes: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class LeftOut:
    """What has no figures, and why: a rule's sentence, or what a model has against it."""

    name: str
    why: str


@dataclass(frozen=True)
class Grid:
    """Schemes by name that the axes are put onto, axes by their places, and schemes that stand beside as they are.

    A place is dotted, as `keys.code.bits`; a name alone is handed down to whatever has it, so `bits` is of keys and
    values.  Several places, separated by commas, move together: `"keys.bits, values.bits" = [[4, 2], [2, 2]]`.
    """

    base: tuple[tuple[str, Scheme], ...]
    axes: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    beside: tuple[tuple[str, Scheme], ...] = ()

    @classmethod
    def of(cls, told: Mapping[str, Any], folder: Path | None = None) -> Self:
        """The grid of a table `base`, `axes`, `beside`; paths in it are from `folder` on.  ValueError for any other."""
        if wrong := [name for name in told if name not in _FIELDS]:
            near = closest(wrong[0], _FIELDS)
            raise ValueError(f"grid: it has no field {wrong[0]!r}; use {near or ', '.join(_FIELDS)}")
        if not told.get("base") and not told.get("beside"):
            raise ValueError("grid: no scheme is in it; give base, as base = 'kivi2'")
        axes = told.get("axes", {})
        if not isinstance(axes, Mapping):
            raise ValueError("axes: this is no table; give places with lists, as bits = [2, 4]")
        named = (_named(told.get(field, ()), folder) for field in ("base", "beside"))
        base, beside = named
        return cls(base, tuple(_flat(axes)), beside)

    @classmethod
    def read(cls, path: Path) -> Self:
        """The grid of a TOML file.  ValueError for what is none."""
        try:
            told = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: this is no TOML: {error}; write a grid, as base = 'kivi2'") from None
        return cls.of(told, path.parent)

    def members(self, sample: int | None = None, seed: int = 0) -> tuple[list[Member], list[LeftOut]]:
        """The members, and combinations that are no schemes.  With `sample` only so many combinations, drawn at random.

        A combination that means what another one does is that one.  ValueError for too many of them, and for a place
        that no base has, SchemeError for a value that cannot be read.
        """
        count = len(self.base)
        for _, values in self.axes:
            count *= len(values)
        if count > MOST and sample is None:
            raise ValueError(f"grid: {count} combinations are more than {MOST}; give fewer values, or a sample of them")
        found, left, seen = list[Member](), list[LeftOut](), dict[str, str]()
        reached = dict.fromkeys((place for place, _ in self.axes), False)
        for one in self._made(count, sample, seed, reached):
            if isinstance(one, LeftOut):
                left.append(one)
            elif one.scheme.hash not in seen:
                seen[one.scheme.hash] = one.name
                found.append(one)
            elif (known := seen[one.scheme.hash]) != one.name:
                left.append(LeftOut(one.name, f"it is the same scheme as {known}"))
        if missed := [place for place, was in reached.items() if not was and count]:
            raise ValueError(f"axes: no base has a place {missed[0]!r}; `kvdsl show NAME --stage scheme` has them all")
        return found, left

    def _made(self, count: int, sample: int | None, seed: int, reached: dict[str, bool]) -> Iterator[Member | LeftOut]:
        for name, scheme in self.beside:
            yield Member(name, scheme)
        numbers: Iterable[int] = range(count)
        if sample is not None and sample < count:
            numbers = sorted(random.Random(f"sample {seed}").sample(range(count), sample))
        for number in numbers:
            yield self._combination(number, reached)

    def _combination(self, number: int, reached: dict[str, bool]) -> Member | LeftOut:
        """Of all combinations the one of a number: the last axis changes first."""
        chosen = list[tuple[str, Any]]()
        for place, values in reversed(self.axes):
            number, at = divmod(number, len(values))
            chosen.insert(0, (place, values[at]))
        base, scheme = self.base[number]
        axes = tuple((place, worded(told)) for place, told in chosen)
        name = " ".join([base, *(f"{place.replace(' ', '')}={told.replace(' ', '')}" for place, told in axes)])
        changes = dict[str, Any]()
        for place, told in chosen:
            for one, single in _single(place, told):
                changes[one] = value(one, single, _at(scheme, one))
        # whole parts first: `bits` then is of a code that another axis chose
        changes = dict(sorted(changes.items(), key=lambda item: (not isinstance(item[1], Part), item[0].count("."))))
        try:
            made = scheme.with_(**changes, **({"source": name} if axes else {}))
        except TypeError as error:  # a place that this combination lacks
            for place, told in chosen:
                reached[place] |= all(_has(scheme, one, changes[one]) for one, _ in _single(place, told))
            return LeftOut(name, str(error))
        except SchemeError as error:
            reached.update(dict.fromkeys(reached, True))
            return LeftOut(name, "; ".join(map(str, error.faults)))
        reached.update(dict.fromkeys(reached, True))
        return Member(name, made, axes)


def worded(told: Any) -> str:
    """A value of an axis in words, as its grid has it."""
    if isinstance(told, (list, tuple)):
        return "[" + ", ".join(map(worded, told)) + "]"
    if isinstance(told, Mapping):
        inner = ", ".join(f"{name}={worded(one)}" for name, one in told.items() if name != "part")
        return f"{told.get('part', '')}({inner})"
    return told if isinstance(told, str) else repr(told)


def axis(text: str) -> tuple[str, list[Any]]:
    """An axis as the command line has it: `bits=2,3,4`, or a list as in TOML behind the sign, `recent=[0, 128]`."""
    place, sign, told = (part.strip() for part in text.partition("="))
    if not sign or not place or not told:
        raise ValueError(f"axis: {text!r} is none; give a place and its values, as bits=2,3,4")
    whole = _plain(told)
    return place, whole if isinstance(whole, list) else [_plain(one) for one in _parted(told)]


def _parted(text: str) -> list[str]:
    """A text at its commas, but those inside of brackets."""
    found, depth = [""], 0
    for sign in text:
        depth += (sign in "([{") - (sign in ")]}")
        if sign == "," and not depth:
            found.append("")
        else:
            found[-1] += sign
    return [one.strip() for one in found]


def _plain(text: str) -> Any:
    """A value of TOML, or the text itself."""
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        return text


def _named(told: Any, folder: Path | None) -> tuple[tuple[str, Scheme], ...]:
    many = [told] if isinstance(told, (str, Path, Scheme)) else told
    if isinstance(many, Mapping):
        return tuple((str(name), load(one)) for name, one in many.items())
    return tuple(_loaded(one, folder) for one in many)


def _loaded(one: Any, folder: Path | None) -> tuple[str, Scheme]:
    if isinstance(one, Scheme):
        return name_of(one), one
    inside = folder / str(one) if folder is not None and str(one).endswith((".toml", ".json")) else None
    scheme = load(one if inside is None or not inside.is_file() else inside)
    return (Path(one).stem if str(one).endswith((".toml", ".json")) else str(one)), scheme


def _flat(axes: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Axes by their whole places; a dotted key of TOML is a table in a table."""
    for name, told in axes.items():
        place = f"{before}.{name}" if before else name
        if isinstance(told, Mapping):
            yield from _flat(told, place)
        elif isinstance(told, (list, tuple)) and told:
            yield place, tuple(told)
        else:
            raise ValueError(f"axes: {place} has no list of values; give some, as {place} = [{told!r}]")


def _single(place: str, told: Any) -> Sequence[tuple[str, Any]]:
    """The places of an axis with the value of each; `both.x` is of either side."""
    places = [one.strip() for one in place.split(",")]
    if len(places) == 1:
        each = [told]
    elif isinstance(told, (list, tuple)) and len(told) == len(places):
        each = list(told)
    else:
        raise ValueError(f"axes: {worded(told)} are no {len(places)} values for {place}; give a list of so many")
    pairs = zip(places, each, strict=True)
    return [*itertools.chain.from_iterable(_sided(one, single) for one, single in pairs)]


def _sided(place: str, told: Any) -> list[tuple[str, Any]]:
    head, _, rest = place.partition(".")
    return [(f"{side}.{rest}", told) for side in ("keys", "values")] if head == "both" and rest else [(place, told)]


def _at(scheme: Scheme, place: str) -> Any:
    found: Any = scheme
    for name in place.split("."):
        found = getattr(found, name, None)
    return found


def _has(scheme: Scheme, place: str, new: Any) -> bool:
    """Whether a change can be made at a place, be the outcome legal or not."""
    try:
        scheme.with_(**{place: new})
    except SchemeError:
        return True
    except TypeError:
        return False
    return True
