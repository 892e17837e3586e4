"""Names of what kernels read side by side: several terms of a side, and several heads that are rotated together.

Lines are written for one term of the program's own head.  Here their names are told apart.
"""

from __future__ import annotations

import re

from .plan import Plan
from .side import SidePlan

OWN = re.compile(r"\b(?:(s|known)|([abenoqrsxy]|total|carried|added)(_?\d+(?:_\d+)?))\b")
"""Names that a term's lines give to what is its own: numbered ones, its scores, its mask of lanes."""
OF_HEAD = "stored|scale|offset|outer|meta|factor|start|three|digit|half"
"""What behind a side's letter names something of one head; so do words, which have a digit there."""

RIGHT = "_right"  # the end of names of what meets the second of two tokens that stand abreast


def kept_rows(plan: Plan) -> str:
    """How many exact rows a sequence has room for: those of sinks in front."""
    return f"({plan.sinks} + ring)" if plan.sinks else "ring"


def mark(side: SidePlan, head: int | None) -> str:
    """What tells the names of a term, read of the head-th of several, from those of the first term and head."""
    return side.mark + "h" * (head or 0)


def head_name(side: SidePlan, head: int) -> str:
    """What the head-th of several is called."""
    return f"{side.letter}_head{head}"


def own(lines: list[str], side: SidePlan, head: int | None) -> list[str]:
    """Lines with names of their own: x0 as xr0 in a residual's term, as xh0 of the second of several heads, whose words
    and stored numbers have names of their own, too."""
    if told := mark(side, head):
        lines = [OWN.sub(rf"\1\2{told}\3", line) for line in lines]
    return lines if head is None else [_of_head(line, side, head) for line in lines]


def _of_head(line: str, side: SidePlan, head: int) -> str:
    letter = side.letter + "h" * head
    line = re.sub(r"\bh\b", head_name(side, head), line)
    line = re.sub(rf"\b(?:{side.name[:-1]}_(?=floats\b)|(?=words\b))", f"{letter}_", line)
    return re.sub(rf"\b{side.letter}(?=\d|_(?:{OF_HEAD}))", letter, line)


def tokens_name(plan: Plan, half: int) -> str:
    """The vector of a sub-tile's tokens, counted in the page."""
    return "t" if plan.halves == 1 else f"t{half}"


def pair_name(plan: Plan, half: int) -> str:
    """The rows of words that the tokens of two sub-tiles share, `half` being either."""
    return "pair" if plan.halves == 2 else f"pair{half // 2}"


def abreast_name(plan: Plan, half: int) -> str:
    """The tokens of two sub-tiles that stand abreast, `half` being the first, counted in the page: [tokens, 2]."""
    return "abreast" if plan.halves == 2 else f"abreast{half // 2}"
