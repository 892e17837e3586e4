"""What the fields of tiers and routers, and the tables of layers and kv heads, may hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from .errors import Fault
from .kinds import KINDS, LARGEST_SEED, LONGEST_WINDOW, Check, count, flag, one_of, share, word
from .saying import kind_of, said
from .scheme import Scheme, Store
from .tiers import Largest, Metric, Moves, Origin, Probes, Requantize, Router, Saliency, Statistic, Tier

MOST_LAYERS = 4096
MOST_TIERS = 8
MOST_NEIGHBOURS = 63
TIER_BITS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 16)


def bits(place: str, value: Any) -> Iterator[Fault]:
    """Bits of a code, 16 for fp16, 0 for tokens that are dropped, None for the store's own."""
    if value is not None and (type(value) is not int or value not in TIER_BITS):
        yield Fault(place, f"{said(value)} bits", "use 1 to 8, 16 for fp16, or 0 to drop tokens")


def top(place: str, value: Any) -> Iterator[Fault]:
    """A count of tokens, a share of them, or None for the rest."""
    if value is not None:
        yield from _amount("tokens", 1, place, value)


def queries(place: str, value: Any) -> Iterator[Fault]:
    """A count of queries, or a share of them; 0 for none."""
    yield from _amount("queries", 0, place, value)


def _amount(what: str, least: int, place: str, value: Any) -> Iterator[Fault]:
    if isinstance(value, float):
        yield from share(what, 1, "0.6, or a count, as 1024")(place, value)
    else:
        yield from count(least, LONGEST_WINDOW, what)(place, value)


def every(place: str, value: Any) -> Iterator[Fault]:
    """A count of tokens, or the word `prompt`."""
    if isinstance(value, str) or value is None:
        if value != "prompt":
            yield Fault(place, f"{said(value)} is no number of tokens", "use an int, as 100, or 'prompt'")
    else:
        yield from count(1, LONGEST_WINDOW, "tokens")(place, value)


def neighbours(place: str, value: Any) -> Iterator[Fault]:
    """An odd number of tokens."""
    found = tuple(count(1, MOST_NEIGHBOURS, "neighbours")(place, value))
    yield from found
    if not found and value % 2 == 0:
        yield Fault(place, f"{value} neighbours have no middle", f"use {value + 1}")


def tiers(place: str, value: Any) -> Iterator[Fault]:
    """A tuple of tiers."""
    if not isinstance(value, tuple):
        yield Fault(place, f"{said(value)} is no tuple of tiers", "write tiers=(Tier(4, top=0.6), Tier(2))")
        return
    if len(value) > MOST_TIERS:
        yield Fault(place, f"{len(value)} tiers are more than {MOST_TIERS}", f"use {MOST_TIERS}")
    for position, item in enumerate(value):
        yield from one_of("Tier(4, top=0.6)", Tier)(f"{place}[{position}]", item)


def table(what: str, example: str) -> Check:
    """Pairs of the indices of layers, or kv heads, and the scheme of those."""

    def check(place: str, value: Any) -> Iterator[Fault]:
        if not isinstance(value, tuple) or not all(isinstance(row, tuple) and len(row) == 2 for row in value):
            yield Fault(
                place, f"{said(value)} is no table of {place}", f"write {place}={{{example}, range(1, 4): kivi4}}"
            )
            return
        for key, scheme in value:
            here = f"{place}[{said(key[0], 20) if len(key) == 1 else said(key, 20)}]"
            if not key:
                yield Fault(here, f"names no {what}", f"write {place}={{{example}}}")
            for index in key:
                if type(index) is not int or not -MOST_LAYERS <= index < MOST_LAYERS:
                    yield Fault(
                        here, f"{said(index)} is no {what} index", f"use an int, as 0, or -1 for the last {what}"
                    )
            if not isinstance(scheme, Scheme):
                yield Fault(here, f"{said(scheme)} is {kind_of(scheme)}, not a Scheme", f"write {place}={{{example}}}")

    return check


_store = one_of("Store(Uniform(bits=4), scale=per_token())", Store, optional=True)

KINDS |= {
    Tier: {"bits": bits, "top": top, "keys": _store, "values": _store},
    Probes: {"recent": queries, "random": queries, "seed": count(0, LARGEST_SEED, "seed")},
    Origin: {},
    Largest: {
        "of": word(Literal["keys", "values"]),
        "by": word(Statistic),
        "smallest": flag,
        "every": every,
    },
    Saliency: {
        "metric": word(Metric),
        "probes": one_of("Probes(recent=0.05, random=0.05)", Probes, optional=True),
        "every": every,
        "moves": word(Moves),
        "pool": neighbours,
        "per": word(Literal["kv_head", "layer"]),
        "later": word(Metric, optional=True),
        "scope": share("tokens", 1, "0.7"),
    },
}
KINDS[Scheme] |= {
    "layers": table("layer", "0: fp16"),
    "heads": table("kv head", "0: fp16"),
    "tiers": tiers,
    "router": one_of('Saliency("normalized", every=100)', Router, optional=True),
    "requantize": word(Requantize),
}
