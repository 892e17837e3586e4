"""A scheme with tiers as schemes without: what each tier stores, and what is measured anew whenever all is quantized.

A number that is one for all tokens of a tier, and is measured on them, cannot stand in a page: it belongs to a sequence
and changes at every flush.  Where it is a factor or a shift of each channel it leaves the products altogether: what is
packed is y = (x - shift) / factor, keys meet q * factor with q . shift added to their scores, and outputs are
multiplied and shifted once.
"""

from __future__ import annotations

import dataclasses as dc
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from .encoding import Feedback
from .part import ALL
from .scheme import SIDES, ChannelScale, Recent, Scheme, Side, Sinks, Store, Tier, Uniform
from .shape import Shape
from .window import waiting


class Measured(NamedTuple):
    """What is measured of each channel, for all tokens of a tier, and stored in `dtype`: the `range` that evenly spaced
    levels cover, `intervals` of them, times `clip`; or sizes that a ChannelScale divides by.  `once`: when the first
    tokens come to tiers, of these alone or, with `waiting`, of those in the window, too; else at every flush."""

    by: str
    once: bool = False
    dtype: str = "fp16"
    intervals: int = 1
    clip: float = 1.0
    waiting: bool = False


@dataclass(frozen=True)
class Segment:
    """One tier of a scheme.

    tier      what the scheme says of it; of one without tiers, all that it stores
    scheme    how its tokens are stored, a scheme without tiers; None where they are dropped
    measured  of each side what is measured of all tokens, and divided out before they are coded
    feedback  how errors of keys are fed forward before these are coded
    """

    tier: Tier
    scheme: Scheme | None
    measured: tuple[Measured | None, Measured | None] = (None, None)
    feedback: Feedback | None = None

    @property
    def rewritten(self) -> bool:
        """Whether other numbers than the tokens' own are coded: they are packed from float32."""
        return any(self.measured) or self.feedback is not None

    @property
    def asks(self) -> str:
        """Why queries of the prompt must be known, in words; nothing where they need not be."""
        if self.feedback is not None:
            return "errors of keys are fed forward by what the prompt's queries weigh"
        balanced = any(about is not None and about.by == "balance" for about in self.measured)
        return "keys are balanced against queries" if balanced else ""

    def placed(self, shape: Shape) -> Shape:
        """The shape that this tier is compiled for: keys before their rotary positions are told where they stand."""
        return replace(shape, placed=True) if self.scheme is not None and self.scheme.keys.rope is not None else shape

    def of(self, side: Side) -> Measured | None:
        """What is measured of a side."""
        return self.measured[SIDES.index(side)]


@lru_cache(maxsize=1024)
def segments(scheme: Scheme) -> tuple[Segment, ...]:
    """The tiers of a routed scheme in order.  Raises SchemeError, as any Scheme does, where one of them is illegal."""
    return tuple(segment(scheme, tier) for tier in scheme.tiers or (Tier(),))


def unwindowed(scheme: Scheme) -> Scheme:
    """The same without sinks and window: no token waits but for those that it is coded with."""
    fed = any(one.feedback is not None for one in segments(scheme))
    blocks = [one.scheme.recent for one in segments(scheme) if one.scheme is not None]
    return scheme.with_(sinks=None, recent=blocks[0] if fed else None)


def front(scheme: Scheme) -> Scheme:
    """What holds the exact tokens of a routed scheme: it never packs."""
    return Scheme(both=Store(), sinks=Sinks(scheme.sinks.tokens) if scheme.sinks else None)


def parts(scheme: Scheme) -> dict[str, Scheme]:
    """What a scheme compiles to, by its place in it: itself, or of a routed one what holds its exact tokens, `exact`,
    and its tiers, `tiers[0]` and so on, one of two that are the same."""
    if scheme.heads:
        rows = {"": dc.replace(scheme, heads=()), **{f"heads[{key[0]}]": one for key, one in scheme.heads}}
        return {f"{row} {place}".strip(): part for row, one in rows.items() for place, part in parts(one).items()}
    if not scheme.routed:
        return {"": scheme}
    found = {"exact": front(scheme)}
    for number, one in enumerate(segments(scheme)):
        if one.scheme is not None and one.scheme not in found.values():
            found[f"tiers[{number}]"] = one.scheme
    return found


def shaped(scheme: Scheme, shape: Shape) -> dict[str, tuple[Scheme, Shape]]:
    """The parts of a scheme, each with the shape that it is compiled for."""
    return {
        place: (part, Segment(Tier(), part).placed(shape) if "tiers[" in place else shape)
        for place, part in parts(scheme).items()
    }


def segment(scheme: Scheme, tier: Tier) -> Segment:
    """One tier of a scheme.  Raises SchemeError where what it stores is illegal."""
    if tier.drops:
        return Segment(tier, None)
    whole = tier.store("keys", scheme.keys)
    keys, measured_keys = _peeled(dc.replace(whole, feedback=None))
    values, measured_values = _peeled(tier.store("values", scheme.values))
    block = math.lcm(*(waiting(term) for store in (keys, values) for term in store.terms))
    recent = Recent(block, "whole") if block > 1 else None
    return Segment(tier, Scheme(keys, values, recent=recent), (measured_keys, measured_values), whole.feedback)


def _peeled(store: Store) -> tuple[Store, Measured | None]:
    """A store without what is measured at every flush, which stands outermost; and what that is."""
    first = store.transform[:1]  # type: ignore[index]
    if first and isinstance(first[0], ChannelScale) and first[0].when != "calibrated":
        measured = Measured(first[0].by, first[0].when != "online", waiting=first[0].when == "arrived")
        return dc.replace(store, transform=store.transform[1:]), measured  # type: ignore[index]
    if spans_all(store):
        assert store.scale is not None and isinstance(store.code, Uniform) and isinstance(store.scale.clip, float)
        levels = store.code.levels or 2 ** (store.code.bits or 0)
        intervals = levels - (store.code.grid == "ends")
        measured = Measured("range", False, store.scale.dtype, intervals, store.scale.clip)
        return store.with_(scale=store.scale.with_(when="calibrated", dtype="fp32", clip=1.0)), measured
    return store, None


def spans_all(store: Store) -> bool:
    """Whether one scale of each channel is of all tokens, measured on them."""
    scale = store.scale
    if scale is None or scale.when != "online" or scale.block.tokens is not ALL:
        return False
    plain = isinstance(store.code, Uniform) and scale.range in (None, "minmax") and scale.zero == "min"
    plain = (
        plain
        and isinstance(scale.clip, float)
        and scale.refit is None
        and scale.quantile is None
        and not scale.floor
        and scale.dtype != "e8m0"
    )
    alone = not store.transform and store.outliers is None and store.residual is None
    return plain and alone and scale.block.channels == 1 and scale.block.heads == 1
