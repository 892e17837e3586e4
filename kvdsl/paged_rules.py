"""Which schemes have pages that sequences can share, and why others have not."""

from __future__ import annotations

from .errors import Fault
from .part import ALL
from .scheme import SIDES, Scheme

LOCAL = "take a scheme whose scales are of tokens, of channels within a page, or calibrated"


def unshared(scheme: Scheme) -> tuple[Fault, ...]:
    """Why pages of a scheme mean nothing outside their sequence; empty where they do."""
    found = []
    if scheme.tiers or scheme.router:
        fact = f"{len(scheme.tiers)} under {scheme.router!r}, so where a token stands follows from the tokens after it"
        found.append(Fault("tiers", fact, LOCAL))
    if scheme.requantize != "never":
        fact = f"{scheme.requantize!r} writes all pages anew whenever tokens leave the window"
        found.append(Fault("requantize", fact, 'take "never"'))
    if scheme.heads:
        fact = f"{len(scheme.heads)} groups of heads have schemes of their own, each needs a pool of its own"
        found.append(Fault("heads", fact, "make a PagedCache for each scheme of Scheme.by_heads"))
    for side in SIDES:
        scale = scheme.side(side).scale
        if scale is not None and scale.when == "online" and scale.block.tokens is ALL:
            fact = "ALL, so one scale is measured on all tokens of a sequence, those behind a page among them"
            found.append(Fault(f"{side}.scale.block.tokens", fact, LOCAL))
    return tuple(found)
