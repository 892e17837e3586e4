"""The language: frozen values that say how the keys and values of a KV cache are stored.

A `Scheme` is a `Store` for the keys and one for the values, and which tokens stay exact.  A `Store` is a code under a
scale.  A spec says what is stored, never how it is laid out or scheduled; it holds no tensors and imports no torch.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, InitVar, dataclass
from functools import cached_property
from typing import Any, Literal, get_args

from .codes import (
    Additive,
    Bands,
    Chosen,
    Code,
    Codebook,
    Float,
    FloatFormat,
    LowRank,
    Rounding,
    Shared,
    Sketch,
    Sparse,
    Uniform,
    Vectors,
    When,
)
from .encoding import Feedback
from .part import ALL, Block, Count, Part
from .scale import MetaFormat, Range, Refit, Scale, Zero, per_channel, per_tensor, per_token
from .store import Parted, Side, Store, TopChannels
from .stretches import Band, bands
from .tiers import DROP, Largest, Origin, Probes, Requantize, Router, Saliency, Tier
from .transforms import (
    Balance,
    ChannelScale,
    ChannelShift,
    Eigenbasis,
    Permute,
    Pick,
    Polar,
    PreRope,
    Rotate,
    Transform,
)

__all__ = [
    "ALL", "Additive",
    "Balance", "Band", "Bands", "Block", "ChannelScale", "ChannelShift", "Chosen", "Code", "Codebook", "Count",
    "DROP", "Eigenbasis", "Feedback", "Float", "FloatFormat", "Flush", "Largest", "Layers", "LowRank", "MetaFormat",
    "Origin", "PARTS", "Part", "Parted", "Permute", "Polar", "Pick", "PreRope", "Prefill", "Probes", "Range", "Recent",
    "Refit", "Requantize", "Rotate", "Rounding", "Router", "SIDES", "Saliency", "Scale", "Scheme", "Shared", "Side",
    "Sinks", "Sketch", "Sparse", "Store", "Tier", "TopChannels", "Transform", "Uniform", "Vectors", "When", "Zero",
    "bands", "per_channel", "per_tensor", "per_token",
]  # fmt: skip

Flush = Literal["auto", "rolling", "whole"]
Prefill = Literal["exact", "stored"]


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
    the end) to schemes of their own.  Raises SchemeError naming every fault, its place and its mend.

    heads       the same of kv heads of a layer, each group of like ones by itself
    queries     what a query is rounded to, behind the keys' transforms, before it meets packed keys; exact ones meet it
                as it is
    tiers       what is neither a sink nor recent goes to one of them, as `router` says; one alone takes all
    requantize  `on_flush`: whenever tokens leave the window, all that is stored is decoded and quantized anew
    """

    inner = ("keys", "values")
    keys: Store = None  # type: ignore[assignment]
    values: Store = None  # type: ignore[assignment]
    _: KW_ONLY
    both: InitVar[Store | None] = None
    sinks: Sinks | None = None
    recent: Recent | None = None
    queries: Store | None = None
    tiers: tuple[Tier, ...] = ()
    router: Router | None = None
    requantize: Requantize = "never"
    prefill: Prefill = "exact"
    layers: Layers | Mapping[Any, Scheme] = ()
    heads: Layers | Mapping[Any, Scheme] = ()
    source: str = ""

    def __post_init__(self, both: Store | None) -> None:
        given = tuple(side for side in SIDES if both is not None and getattr(self, side) is not None)
        stores = {} if both is None else {"keys": both, "values": both}
        tiers = tuple(self.tiers) if isinstance(self.tiers, list) else self.tiers
        tables = {"layers": _table(self.layers), "heads": _table(self.heads)}
        for field, value in {**stores, **tables, "tiers": tiers}.items():
            object.__setattr__(self, field, value)
        from .rules import refuse

        refuse(self, given)

    def _repr_html_(self) -> str:
        from .notebook import of_scheme

        return of_scheme(self)

    def side(self, name: Side) -> Store:
        """What stores one side: of shared values the store of the keys' first stretch."""
        return self.keys if name == "keys" else self._of_values

    @cached_property
    def _of_values(self) -> Store:
        if not self.shared:
            return self.values
        first = self.keys.terms[0]
        return Store(first.code, scale=first.scale)

    @property
    def shared(self) -> bool:
        """Whether values are a stretch of the keys."""
        return isinstance(self.values.code, Shared)

    @property
    def head_dim(self) -> int | None:
        """Channels of a key, where the scheme itself says so: it fits no other shape."""
        codes = (store.code for store in (self.keys, self.values))
        return next((code.head_dim for code in codes if isinstance(code, Bands) and code.head_dim), None)

    def dim(self, side: Side, head_dim: int) -> int:
        """Numbers of a vector of one side, where a key has `head_dim`."""
        return self.keys.terms[0].coded(head_dim) if side == "values" and self.shared else head_dim

    @property
    def routed(self) -> bool:
        """Whether tokens go to tiers, or are quantized anew: a cache of segments, see segments.py."""
        return bool(self.tiers) or self.requantize != "never"

    def for_layer(self, index: int, layers: int) -> Scheme:
        """The scheme of layer `index` in a model of `layers` layers."""
        return _listed(self.layers, index, layers) or self

    def by_heads(self, kv_heads: int) -> tuple[tuple[tuple[int, ...], Scheme], ...]:
        """The kv heads of a layer in groups, each with its scheme, one without such a table: those that are not listed,
        if there are any, then row by row."""
        alone = dc.replace(self, heads=())
        own = [_listed(self.heads, head, kv_heads) or alone for head in range(kv_heads)]
        schemes = [alone, *(scheme for _, scheme in self.heads)]
        groups = ((tuple(h for h, one in enumerate(own) if one is scheme), scheme) for scheme in schemes)
        return tuple((heads, scheme) for heads, scheme in groups if heads)

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


def _listed(table: Any, index: int, count: int) -> Scheme | None:
    """What a table has for one of `count` places, negative ones being counted from the end."""
    found = (scheme for key, scheme in table if index in {i + count if i < 0 else i for i in key})
    return next(found, None)


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
_CODES: tuple[type[Part], ...] = tuple(code for code in get_args(Code) if code is not Chosen)
_TRANSFORMS: tuple[type[Part], ...] = get_args(Transform)
_PARTS = (Block, Scale, *_CODES, *_TRANSFORMS, Feedback, TopChannels, Store, Recent, Sinks, Tier, Probes, Scheme)
PARTS: dict[str, type[Part]] = {c.__name__: c for c in _PARTS}
