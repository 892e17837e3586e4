"""Which of several measured schemes none dominates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from kvdsl.search_pairs import front as places

Figures = Mapping[str, float | None]


def front(rows: Sequence[Figures], cost: str, loss: str) -> list[int]:
    """Places of the rows that none dominates, from the least cost on; those without either figure are on no front.

    A row dominates another that is worse in one figure and not better in the other; of equal ones the first stays.
    """
    known = [i for i, row in enumerate(rows) if _known(row.get(cost)) and _known(row.get(loss))]
    return [known[i] for i in places([(float(rows[i][cost] or 0), float(rows[i][loss] or 0)) for i in known])]


def _known(number: float | None) -> bool:
    return number is not None and math.isfinite(number)
