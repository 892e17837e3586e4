"""The query of an attention kernel, gathered at channels that a page names."""

from __future__ import annotations

from .plan import Plan, SidePlan
from .text import padded


def gathers(plan: Plan) -> bool:
    """Whether a term of the keys reads the query at channels that a page names."""
    return any(term.store.gathers for term in plan.keys.terms)


def where_gathered(plan: Plan, name: str = "gathered", rows: str = "row_index[None, :]") -> str:
    """The line that says where the query's numbers begin, channel by channel: a number of all rows is one read."""
    size = plan.shape.head_dim * plan.shape.group
    return f"{name} = gathered_ptr + bh.to(tl.int64) * queries * {size} + {rows}"


def stride(plan: Plan) -> str:
    """How far the query's numbers of a channel are from those of the next."""
    return f"(queries * {plan.shape.group})"


def whole(plan: Plan) -> str:
    """The load of the query at all channels, [channels, rows]."""
    dim = plan.shape.head_dim
    lane = f"tl.arange(0, {padded(dim)})"
    mask = "live[None, :]" + (f" & ({lane} < {dim})[:, None]" if padded(dim) > dim else "")
    return f"tl.load(gathered + ({lane} * {stride(plan)})[:, None], mask={mask}, other=0.0)"


def at_channels(plan: Plan, channel: str, known: str = "") -> str:
    """The load of the query at some channels, [channels, rows]; 0 where they are not `known`."""
    live = "live[None, :]" + (f" & {known}" if known else "")
    return f"tl.load(gathered + ({channel} * {stride(plan)})[:, None], mask={live}, other=0.0)"


def chosen(plan: Plan, side: SidePlan, channel: str, first: str, lane: str, known: str = "") -> list[str]:
    """Lines that load which channels are chosen for the tokens of the page from `first` on, where they are `known`."""
    held, pointer = side.choice, f"{side.letter}_channels"
    start = f"{first} // {held.tokens} * {held.count} + " if held.blocks > 1 else ""
    mask = f", mask={known}, other=0" if known else ""
    return [
        f"{channel} = tl.load({pointer} + {start}{lane}{mask}).to(tl.int32)",
        # of a page that was never written it is any
        f"{channel} = tl.minimum({channel}, {plan.shape.head_dim - 1})",
    ]
