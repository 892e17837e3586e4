"""What is legal of errors that are fed forward: whose they are, and that tokens are coded together."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from .encoding import Feedback
from .errors import Fault
from .kinds import KINDS, MOST_RANK, WIDEST, count
from .saying import said
from .scheme import Codebook, Float, Scheme, Store, Uniform
from .sites import Site, rule
from .window import waiting

LEAST_FED = 8  # channels of a block: all of a head is packed once for each
MOST_WEIGHT = 1e6


def weight(place: str, value: Any) -> Iterator[Fault]:
    """What an error along a query counts, beside the error itself."""
    if type(value) is not float or not (math.isfinite(value) and 0 <= value <= MOST_WEIGHT):
        yield Fault(place, f"{said(value)} is no weight from 0 to {MOST_WEIGHT:g}", "use a float, as 0.001")


KINDS[Feedback] = {
    "rank": count(1, MOST_RANK, "directions"),
    "weight": weight,
    "channels": count(LEAST_FED, WIDEST, "channels"),
}


@rule("~.feedback")
def _the_queries_of_a_prompt_are_known_to_tiers(site: Site) -> Iterator[Fault]:
    if site.store.feedback is None:
        return
    if "." in site.place:
        fact, mend = "errors are fed forward in all of a key, and this store has a part of it", "leave it out"
    else:
        fact = "queries of a prompt are at hand where its tokens go to a tier, and the scheme has none"
        mend = "add tiers=(Tier(),), and flush='whole' to the window"
    yield site.fault("feedback", fact, mend)


def of_tier(scheme: Scheme, place: str, store: Store) -> Iterator[Fault]:
    """The mistakes of feedback in a store of a scheme with tiers that stands at `place`."""
    part = store.feedback
    if part is None:
        return
    place, inner = f"{place}.feedback", store.scale is not None and store.scale.block.channels
    if "values" in place:
        yield Fault(place, "queries weigh the errors of keys", "leave it out of values")
    plain = isinstance(store.code, (Uniform, Codebook, Float)) and store.scale is not None
    if not plain or store.transform or store.outliers is not None or store.residual is not None:
        fact = "errors are fed forward between the vector's own channels, each a code under a scale"
        yield Fault(place, fact, "leave transform, outliers and residual out, and give a scale")
    elif not isinstance(inner, int) or part.channels % inner:
        groups = f"groups of {inner}" if isinstance(inner, int) else "one group"
        fact = f"blocks of {part.channels} channels cut through {groups} that share a scale"
        yield Fault(f"{place}.channels", fact, "use a multiple of the scale's channels, or per_channel(tokens=32)")
    if len(scheme.tiers) != 1:
        fact = f"{len(scheme.tiers)} tiers: tokens that are coded together need not be sent to one together"
        yield Fault(place, fact, "use tiers=(Tier(),) and no router")
    if scheme.requantize != "never":
        yield Fault(place, "what is decoded is no key that an error could be told of", "leave requantize out")
    beside = next((own for tier in scheme.tiers if (own := tier.own("values"))), scheme.values)
    group, recent = math.lcm(waiting(store), waiting(beside)), scheme.recent
    if group > 1 and (recent is None or recent.flush != "whole" or recent.tokens % group):
        least = group if recent is None else -(-recent.tokens // group) * group
        fact = f"{group} tokens are coded together, and must leave the window together"
        yield Fault("recent", fact, f"use Recent({least}, 'whole')")
