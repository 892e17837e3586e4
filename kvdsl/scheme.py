"""The language: frozen values that say how the keys and values of a KV cache are stored.

A `Scheme` is a `Store` for the keys and one for the values, and which tokens stay exact.  A `Store` is a code under a
scale.  A spec says what is stored, never how it is laid out or scheduled; it holds no tensors and imports no torch.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, InitVar, dataclass
from functools import cached_property
from typing import Any, Literal, Self


class _All:
    """The whole axis: all channels of a head, all kv heads of a layer, all tokens."""

    def __repr__(self) -> str:
        return "ALL"

    def __reduce__(self) -> str:
        return "ALL"


ALL = _All()
Count = int | _All
Rounding = Literal["even", "half_up", "floor"]
Grid = Literal["ends", "cells"]
Range = Literal["minmax", "minmax_zero", "absmax", "signed_absmax"]
Zero = Literal["min", "point", "in_scale"]
FloatFormat = Literal["fp16", "fp32"]
MetaFormat = Literal["fp32", "fp16", "bf16"]
When = Literal["online", "calibrated"]
Flush = Literal["auto", "rolling", "whole"]
Prefill = Literal["exact", "stored"]
Side = Literal["keys", "values"]


class Part:
    """What every constructor shares: a repr a user would have written, `with_`, and a walk over the spec."""

    def __repr__(self) -> str:
        from .text import spelled

        return spelled(self)

    def with_(self, **changes: Any) -> Self:
        """A copy with fields replaced; a name this part lacks goes down to every inner part that has it.

        A dotted path (`{"keys.scale.dtype": "bf16"}`) reaches one inner field.  Raises TypeError for a name nobody has.
        """
        own = {f.name for f in dc.fields(self)}  # type: ignore[arg-type]
        if isinstance(self, Scheme) and "both" in changes:
            changes |= {"keys": changes["both"], "values": changes.pop("both")}
        new = {name: value for name, value in changes.items() if name in own}
        for name, value in changes.items():
            if name in own:
                continue
            head, _, rest = name.partition(".")
            if rest and head in own and isinstance(inner := new.get(head, getattr(self, head)), Part):
                new[head] = inner.with_(**{rest: value})
            elif not self._hand_down(name, value, new):
                raise TypeError(f"{type(self).__name__} and its parts have no field {name!r}")
        return dc.replace(self, **new)  # type: ignore[type-var]

    def _hand_down(self, name: str, value: Any, new: dict[str, Any]) -> bool:
        found = False
        for field in _INNER.get(type(self).__name__, ()):
            part = new.get(field, getattr(self, field))
            if isinstance(part, Part):
                try:
                    new[field] = part.with_(**{name: value})
                    found = True
                except TypeError:
                    pass
        return found

    def to_dict(self) -> dict[str, Any]:
        """A tree of dicts, lists, strings and numbers: `part`, and the fields that differ from their default."""
        from .text import to_dict

        return to_dict(self)

    def walk(self, path: str = "") -> Iterator[tuple[str, Part]]:
        """This part and every part inside it, each with its dotted path in the spec."""
        yield path, self
        for field in dc.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, Part):
                yield from value.walk(f"{path}.{field.name}".lstrip("."))


_INNER = {"Scheme": ("keys", "values"), "Store": ("code", "scale"), "Scale": ("block",)}


@dataclass(frozen=True, repr=False)
class Block(Part):
    """The set of numbers that share one scale: `tokens` x `channels` x `heads`."""

    tokens: Count = 1
    channels: Count = ALL
    heads: Count = 1


@dataclass(frozen=True, repr=False)
class Scale(Part):
    """How a block is measured and how the measure is stored.

    With L levels and x the block: `minmax` has lo, hi = clip*min, clip*max; `minmax_zero` widens that to hold 0;
    `absmax` has s = clip*max|x| / the top level; `signed_absmax` has s = the x of largest size / the lowest level.
    `zero` says what is stored beside s where the range has an offset: `min` stores lo, `point` the integer
    round(-lo/s), `in_scale` that integer in the lowest mantissa bits of an fp32 s.
    """

    block: Block = Block()
    _: KW_ONLY
    range: Range = "minmax"
    clip: float = 1.0
    zero: Zero = "min"
    dtype: MetaFormat = "fp16"
    when: When = "online"


def per_token(channels: Count = ALL, heads: Count = 1, **scale: Any) -> Scale:
    """One scale for each token and each group of `channels` (and of `heads` kv heads)."""
    return Scale(Block(1, channels, heads), **scale)


def per_channel(tokens: Count = ALL, **scale: Any) -> Scale:
    """One scale for each channel of a head and each group of `tokens`."""
    return Scale(Block(tokens, 1), **scale)


def per_tensor(**scale: Any) -> Scale:
    """One scale for all tokens, channels and heads of a layer."""
    return Scale(Block(ALL, ALL, ALL), **scale)


@dataclass(frozen=True, repr=False)
class Uniform(Part):
    """Equally spaced levels, coded as integers 0..levels-1.

    grid `ends`: the range's ends are levels, step (hi-lo)/(L-1), decoded at lo + s*c.
    grid `cells`: the range is cut into L cells, step (hi-lo)/L, decoded at lo + s*(c + 1/2).
    `levels` None: 2**bits, but 2**bits - 1 under `absmax` with grid `ends`, so that 0 is a level and the grid is even.
    """

    bits: int | None = None
    _: KW_ONLY
    levels: int | None = None
    grid: Grid = "ends"
    rounding: Rounding = "even"


@dataclass(frozen=True, repr=False)
class Float(Part):
    """The number itself, rounded to a float format."""

    format: FloatFormat = "fp16"


Code = Uniform | Float


@dataclass(frozen=True, repr=False)
class Store(Part):
    """What is stored of a vector: a code, and the scale it needs."""

    code: Code = Float("fp16")
    _: KW_ONLY
    scale: Scale | None = None


@dataclass(frozen=True, repr=False)
class Recent(Part):
    """The newest tokens stay exact.

    rolling: exactly `tokens` of them; whole: they leave together when `tokens` are full; auto: whole for a side whose
    scale spans several tokens, else rolling.
    """

    tokens: int
    flush: Flush = "auto"


@dataclass(frozen=True, repr=False)
class Sinks(Part):
    """The first `tokens` tokens of a sequence stay exact and outside all statistics."""

    tokens: int


Layers = tuple[tuple[tuple[int, ...], "Scheme"], ...]


@dataclass(frozen=True, repr=False)
class Scheme(Part):
    """A way to store a KV cache.  `both=` gives keys and values one store; `layers` maps layer indices (negative: from
    the end) to schemes of their own.  Raises SchemeError naming every fault, its place and its mend."""

    keys: Store = None  # type: ignore[assignment]
    values: Store = None  # type: ignore[assignment]
    _: KW_ONLY
    both: InitVar[Store | None] = None
    sinks: Sinks | None = None
    recent: Recent | None = None
    prefill: Prefill = "exact"
    layers: Layers | Mapping[Any, Scheme] = ()
    source: str = ""

    def __post_init__(self, both: Store | None) -> None:
        given = tuple(side for side in SIDES if both is not None and getattr(self, side) is not None)
        stores = {} if both is None else {"keys": both, "values": both}
        for field, value in {**stores, "layers": _table(self.layers)}.items():
            object.__setattr__(self, field, value)
        from .rules import refuse

        refuse(self, given)

    def side(self, name: Side) -> Store:
        """The store of one side."""
        return self.keys if name == "keys" else self.values

    def for_layer(self, index: int, layers: int) -> Scheme:
        """The scheme of layer `index` in a model of `layers` layers."""
        for key, scheme in self.layers:
            if index in {i + layers if i < 0 else i for i in key}:
                return scheme
        return self

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Scheme:
        """The scheme of a tree.  Raises SchemeError naming every unknown key and part, and every fault."""
        from .text import from_dict

        return from_dict(tree)

    def to_json(self) -> str:
        """The tree as JSON."""
        from .text import to_json

        return to_json(self)

    @classmethod
    def from_json(cls, text: str) -> Scheme:
        """Raises SchemeError for text that is no JSON, names a key twice, or is no spec."""
        from .text import from_json

        return from_json(text)

    def to_toml(self) -> str:
        """The tree as TOML, one line a field."""
        from .text import to_toml

        return to_toml(self)

    @classmethod
    def from_toml(cls, text: str) -> Scheme:
        """Raises SchemeError for text that is no TOML or no spec."""
        from .text import from_toml

        return from_toml(text)

    @cached_property
    def hash(self) -> str:
        """Twelve hex digits of the meaning: `source` does not enter, the language's version does."""
        from .text import digest

        return digest(self)


def _table(layers: Any) -> Any:
    """Rows in order of their first layer, so that equal tables are equal; no table stays as it is, for the rules."""
    if not isinstance(layers, (Mapping, tuple, list)):
        return layers
    items = layers.items() if isinstance(layers, Mapping) else layers
    if not all(isinstance(row, (tuple, list)) and len(row) == 2 for row in items):
        return tuple(layers)
    return tuple(_ordered((_indices(key), scheme) for key, scheme in items))


def _indices(key: Any) -> tuple[Any, ...]:
    if isinstance(key, range) and len(key) > 1 << 12:
        return (key,)
    return tuple(_ordered(key)) if isinstance(key, (range, tuple, list)) else (key,)


def _ordered(rows: Iterable[Any]) -> list[Any]:
    """Sorted by their indices, or as they are where one is no number."""
    rows = list(rows)
    try:
        return sorted(rows, key=lambda row: row[0] if isinstance(row, tuple) else row)
    except TypeError:
        return rows


SIDES: tuple[Side, Side] = ("keys", "values")
PARTS: dict[str, type[Part]] = {c.__name__: c for c in (Block, Scale, Uniform, Float, Store, Recent, Sinks, Scheme)}
