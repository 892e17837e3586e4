"""Kernels of tokens that stand in any order, in Triton: where each token stands is loaded, and masks compare positions.

No page is one that every row sees throughout: the main loop reads what is packed on both sides, and masks it, too.  A
tile has no first position that the query could be turned by once, so keys behind rotary positions meet a row of cosines
and sines for each token, in the main loop as at the edges.
"""

from __future__ import annotations

from .plan import Plan
from .text import fill, plus

Holes = dict[str, list[str] | str]

PLACES = ["place_ptr", "room", "origin"]
"""Arguments: places of tokens (B, H, room), and what is added to them."""
LOOSE = ', "room", "origin"'
"""Those that no kernel is compiled anew for."""
BOUNDS = """
# clean pages: every row sees all of their tokens, and both sides are packed
newest_start = tl.maximum(start, asked - window)$less_sinks
low = (tl.maximum(newest_start, 0) + $page_less) // $page
high = tl.minimum(tl.minimum(packed_keys, packed_values), asked - queries + 1$less_sinks)
high = tl.maximum(high, 0) // $page
oldest_start = tl.maximum(start, asked - queries - window + 1)$less_sinks
edge = tl.maximum(tl.minimum(oldest_start, length$less_sinks), 0) // $page
clean = high > low
low = tl.where(clean, low, edge)
high = tl.where(clean, high, edge)
"""
PLACED_BOUNDS = """
# pages that are packed on both sides, wherever their tokens stand
low = 0
edge = 0
high = tl.minimum(packed_keys, packed_values) // $page
"""


def stand_name(plan: Plan, half: int) -> str:
    """The vector of the positions of a sub-tile's tokens."""
    return "stand" if plan.halves == 1 else f"stand{half}"


def base(plan: Plan) -> str:
    """The line that says where the places of a head's tokens behind the sinks are."""
    return f"places = place_ptr + bh.to(tl.int64) * room{plus(plan.sinks)}"


def of_tokens(plan: Plan, u: str, mask: str, name: str = "stand") -> list[str]:
    """Lines that load the positions of the tokens at u where a mask says that they are there, or 0."""
    return [base(plan), f"{name} = tl.load(places + {u}, mask={mask}, other=0) + origin"]


def of_tile(plan: Plan, half: int, mask: str = "") -> list[str]:
    """The same for a sub-tile of a page that is packed throughout, or as far as a mask says."""
    shift = f" + {half * plan.half}" if half else ""
    masked = f", mask={mask}, other=0" if mask else ""
    return [
        f"u = tile * {plan.tile}{shift} + tl.arange(0, {plan.half})",
        f"{stand_name(plan, half)} = tl.load(places + u{masked}) + origin",
    ]


def of_edges(plan: Plan) -> list[str]:
    """Lines that say which edge tokens are there, where they stand, and which rows see them."""
    return [
        f"here = (u >= {-plan.sinks}) & (u < end)",
        "stand = tl.load(places + u, mask=here, other=0) + origin",
        f"{seen('seen', 'stand')} & here[:, None]",
    ]


def seen(name: str, stand: str) -> str:
    """The line that says which rows see tokens by their positions."""
    return f"{name} = ({stand}[:, None] <= last[None, :]) & ({stand}[:, None] >= oldest[None, :])"


def order(plan: Plan, shared: dict[str, int | str]) -> tuple[Holes, list[str], list[str]]:
    """What attention's masks follow from, places in the order of tokens or where each token stands; the lines that say
    which pages the main loop reads; and those that say which rows see the tokens of an edge tile, and which are
    there."""
    sinks = plan.sinks
    if plan.shape.placed:
        rows = ["last = asked - queries + token  # [rows]", "oldest = tl.maximum(start, last - window + 1)  # [rows]"]
        holes: Holes = {
            "loose": LOOSE.removeprefix(", "), "asked": "tl.load(asked_ptr + b)", "places": [base(plan), *rows],
            "rows_see": [],
        }  # fmt: skip
        return holes, fill(PLACED_BOUNDS, **shared).splitlines(), of_edges(plan)
    last = f"last = tl.minimum(asked - queries + token, length - 1){plus(-sinks)}  # [rows]"
    oldest = f"oldest = tl.maximum(start, asked - queries + token - window + 1){plus(-sinks)}  # [rows]"
    holes = {"loose": '"ahead"', "asked": "length + ahead", "places": [], "rows_see": [last, oldest]}
    masks = [f"{seen('seen', 'u')} & (u >= {-sinks})[:, None]", f"here = (u >= {-sinks}) & (u < end)"]
    return holes, fill(BOUNDS, **shared).splitlines(), masks
