"""What programs of attention store at their ends, in Triton: outputs of their share of the tokens, and logarithms of
their mass."""

from __future__ import annotations

from .plan import Plan
from .text import fill
from .triton_abreast import LEFT, ROWS, masked
from .triton_sides import ValueSide

# Stored in either branch: what both need at their ends would otherwise be kept in registers through the loops.
PARTIALS = """
let_next_begin()
$united
inverse = reciprocal(tl.where(mass > 0.0, mass, 1.0))$share
out = ((split.to(tl.int64) * tl.num_programs(0) + bh) * tl.num_programs(2) + block) * $rows
partial = partial_ptr + (out + tl.arange(0, ROWS))[None, :] * $dim
$stores
$exact
lse = tl.where(mass > 0.0, peak * size + logarithm(tl.where(mass > 0.0, mass, 1.0)), -1.0e30)
tl.store(lse_ptr + out + tl.arange(0, ROWS), lse$once)
"""

# Both tokens' sums become one, in units of the higher of their maxima.
UNITED = """\
higher = higher_of_both(peak)
decay = tl.exp2((peak - higher) * size)
peak = higher
mass = sum_of_both(mass * decay)
"""


def partials(plan: Plan, values: ValueSide, *, edges: bool) -> list[str]:
    """Lines that store a program's outputs; those of its exact tokens apart where values are turned."""
    exact, abreast = list[str](), plan.abreast
    rows, united = ROWS if abreast else "ROWS", abreast and not edges
    once = LEFT if abreast else ""
    if edges and values.exact_rows is not None:
        exact = ["slot = ((split - splits).to(tl.int64) * tl.num_programs(0) + bh) * tl.num_programs(2) + block"]
        exact.append(f"slot = slot * {rows} + tl.arange(0, ROWS)")
        exact += values.exact_rows.stores(once)
        if values.side.shifted:
            exact.append(f"tl.store(share_ptr + slot, coded_mass * inverse{masked(once)})")
    return fill(
        PARTIALS,
        dim=values.side.row,
        united=UNITED.splitlines() if united else [],
        share=" * decay" if united else "",
        rows=f"({rows})" if abreast else rows,
        stores=values.stores("partial", "columns_of_both" if united else "", once),
        exact=exact,
        once=masked(once),
    ).splitlines()
