"""What is legal of single numbers that are kept as they are: lines that end, and codes that leave something of them."""

from __future__ import annotations

from collections.abc import Iterator

from .codes import SLOT_TOKENS
from .errors import Fault
from .outlier_rules import nothing_left
from .scheme import ALL, Block, Sparse
from .shape import Shape
from .sites import Site, rule


@rule("~.code", "~.outliers", "~.transform")
def _single_numbers_are_of_a_vector(site: Site) -> Iterator[Fault]:
    store = site.store
    if not isinstance(store.outliers, Sparse):
        return
    if site.inner or site.band is not None:
        fact = "single numbers are taken out of a vector as it came"
        yield site.fault("outliers", fact, "leave outliers out" if site.apart else "move outliers to the outer store")
    yield from nothing_left(site)


@rule("~.outliers")
def _a_line_is_finite_or_has_thresholds(site: Site) -> Iterator[Fault]:
    sparse = site.store.outliers
    if not isinstance(sparse, Sparse):
        return
    channel = Block(ALL, 1)
    if sparse.when == "calibrated" and sparse.line != channel:
        fact = "calibrated thresholds are a channel's, for all of its tokens"
        yield site.fault("outliers.line", fact, "use Block(ALL, 1), or when='online'")
    elif sparse.when == "online" and sparse.line.tokens is ALL:
        fact = "a line of all tokens cannot be appended to"
        other = ", or when='calibrated'" if sparse.line == channel else ""
        yield site.fault("outliers.line.tokens", fact, f"use a group, as {SLOT_TOKENS}{other}")


def shape_faults(site: Site, shape: Shape) -> Iterator[Fault]:
    """Lines that do not fit the heads, or of which nothing is left."""
    sparse = site.store.outliers
    if not isinstance(sparse, Sparse) or sparse.when == "calibrated":
        return
    line, numbers = sparse.line, 1
    for field, whole in (("channels", shape.head_dim), ("heads", shape.kv_heads)):
        count = getattr(line, field)
        length = count if isinstance(count, int) else whole
        numbers *= length
        if whole % length:
            yield site.fault(f"outliers.line.{field}", f"{length} {field} do not divide {whole}", "use ALL")
            return
    numbers *= line.tokens if isinstance(line.tokens, int) else 1
    if 2 * sparse.taken(numbers) >= numbers:
        fact = f"of the {numbers} number{'s' * (numbers > 1)} of a line none is left"
        yield site.fault("outliers.line", fact, "use a longer line, as Block() or Block(64, 1)")
