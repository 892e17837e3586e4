"""What is legal of factors of tiles: where they stand, and the scale that takes up those along the other axis."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from .errors import Fault
from .kinds import KINDS, LEAST_FACTORED, LONGEST_BLOCK, MOST_LOOPS, count, word
from .saying import said
from .scheme import ALL, Balance, Uniform
from .sites import Site, rule

MOST_EXPONENT = 20.0


def exponent(place: str, value: Any) -> Iterator[Fault]:
    """A float that e is raised to."""
    if type(value) is not float or not abs(value) <= MOST_EXPONENT:
        yield Fault(place, f"{said(value)} is no exponent of e up to {MOST_EXPONENT:g}", "use a float, as -0.3")


KINDS[Balance] = {
    "tokens": count(LEAST_FACTORED, LONGEST_BLOCK, "tokens"),
    "loops": count(1, MOST_LOOPS, "loops"),
    "low": exponent,
    "high": exponent,
    "unit": word(Literal["rms"], optional=True),
}


@rule("~.code", "~.scale", "~.transform", "~.outliers", "~.residual")
def _tiles_are_balanced_last_and_under_a_scale(site: Site) -> Iterator[Fault]:
    store = site.store
    places = [i for i, part in enumerate(store.transform) if isinstance(part, Balance)]  # type: ignore[arg-type]
    if not places:
        return
    last = len(store.transform) - 1  # type: ignore[arg-type]
    if places != [last]:
        yield site.fault(f"transform[{places[0]}]", "tiles of what is coded are balanced", "put Balance() last, once")
        return
    part, place = store.transform[last], f"transform[{last}]"  # type: ignore[index]
    assert isinstance(part, Balance)
    if part.low > part.high:
        fact = f"factors of e^{part.low:g} at least and e^{part.high:g} at most are none"
        yield site.fault(f"{place}.low", fact, f"use {min(part.low, part.high):g} or less")
    if store.rope is not None or store.polar:
        fact = "positions and angles are put back on decoded numbers, and a factor of a tile is not one of theirs"
        yield site.fault(place, fact, "leave it out")
    if site.band is not None or ".residual" in site.place or store.residual is not None or store.outliers is not None:
        yield site.fault(place, "tiles are balanced of a store that has all of a vector", "leave it out")
    if not isinstance(store.code, Uniform):
        yield site.fault(place, "the scale takes up factors where levels are evenly spaced", "use Uniform(bits=4)")
    block = store.scale.block if store.scale is not None else None
    keys = site.side == "keys"
    right = (part.tokens, 1, 1) if keys else (1, ALL, 1)
    if block is not None and (block.tokens, block.channels, block.heads) != right:
        fact = f"factors of {'tokens' if keys else 'channels'} stand beside a scale along the other axis alone"
        yield site.fault("scale.block", fact, f"use per_channel(tokens={part.tokens})" if keys else "use per_token()")
    if store.scale is not None and (store.scale.when != "online" or store.scale.scale is not None):
        yield site.fault("scale", "what tiles are divided by is measured online", "use when='online', and one level")
