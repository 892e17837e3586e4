"""Two tokens abreast, in Triton: a product has eight columns, of which one query of up to four heads a kv head leaves
half idle.

Of two sub-tiles the first one's tokens stand on the left, where its columns are the query rows, and the second one's on
the right, where the same rows are once more.  A query is two operands, each with zeros in the other's columns, so that
products of both sub-tiles add up to one tile of scores [tokens, columns]: as many products as before, and half as many
scores, scales and weights a lane.  Weights are two operands of values in the same way, whose sums need no more room.
Each column has maxima and a mass of its own; when a program ends both become one.  At the edges, whose tiles are one
product high, the columns on the right are idle as before, and what is on the left is stored.

Instructions of a tile's main loop on sm_90, before and so: `token2` 1,238 and 1,050, `token3` 1,957 and 1,757, `kivi2`
2,132 and 1,930.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from .triton_names import RIGHT, abreast_name, tokens_name

if TYPE_CHECKING:
    from .plan import Plan

ROWS = "ROWS // 2"  # that are stored
LEFT = "left"  # the mask of the columns on the left


def row_index(abreast: bool) -> str:
    """The query row of every column."""
    return f"block * ({ROWS}) + tl.arange(0, ROWS) % ({ROWS})" if abreast else "block * ROWS + tl.arange(0, ROWS)"


def columns() -> list[str]:
    """Lines that tell the columns on the left from the others, and the factors that do."""
    left = f"{LEFT} = tl.arange(0, ROWS) < {ROWS}"
    return [left, f"on_left = tl.where({LEFT}, 1.0, 0.0).to(tl.float16)[None, :]"]


def both_of(plan: Plan, half: int) -> list[str]:
    """The line that names the tokens of two sub-tiles, as columns: [tokens, 2]."""
    first = f"{tokens_name(plan, half)}[:, None]"
    return [f"{abreast_name(plan, half)} = {first} + (tl.arange(0, 2) * {plan.half})[None, :]"]


def in_columns(numbers: str) -> str:
    """What each token has stored [tokens, 2], in all of its columns."""
    return f"over_columns({numbers}, {ROWS})"


def parted(queries: Iterable[str]) -> list[str]:
    """Lines that make two operands of each query, zeros on the right and zeros on the left: by a factor, which takes
    pairs of numbers."""
    lines = []
    for name in queries:
        lines.append(f"{name}{RIGHT} = {name} - {name} * on_left")
        lines.append(f"{name} = {name} * on_left")
    return lines


def apart(weights: str) -> list[str]:
    """Lines that make two operands of weights in the same way."""
    return [f"whole = {weights}", "weight = whole * on_left", f"weight{RIGHT} = whole - weight"]


def masked(columns: str) -> str:
    """The mask of a store, where it has one."""
    return f", mask={columns}" if columns else ""
