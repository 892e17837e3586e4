"""Sweeps and recommendations as a person reads them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from kvdsl.sweeping.choice import Beside, Recommendation
from kvdsl.sweeping.results import Figured, Sweep

if TYPE_CHECKING:
    from rich.table import Table

MOST = 12  # left out, told one by one
_CELLS = {
    "bits": ("bits", "{:.3f}"), "packed_bits": ("no window", "{:.3f}"), "perplexity": ("perplexity", "{:.2f}"),
    "delta": ("delta", "{:+.2f}"), "kl": ("KL", "{:.4f}"), "same": ("same", "{:.0%}"),
    "microseconds": ("us", "{:.1f}"), "share": ("share", "{:.0%}"),
}  # fmt: skip
"""Measure to the head of its column and how a number is written."""


def swept(found: Sweep) -> tuple[list[Table], list[str]]:
    """All members, those of the fronts marked; what was left out, and where it is."""
    fronts = {name: {one.scheme.hash for one in found.front(name)} for name in ("bits", "time")}
    table = _table("member", f"{found.about['model']}, {found.about['text']}", ("front",))
    for one in sorted(found.members, key=lambda one: one.figures.get("bits") or 0):
        marks = ", ".join(name for name, those in fronts.items() if one.scheme.hash in those)
        table.add_row(one.name, *_cells(one), marks)
    about = found.about
    lines = [
        f"front     none has fewer bits (less time) and less KL; full precision {_full(found.members)}",
        f"us        predicted, {about['gpu']}: attention of {about['layers']} layers reads {about['batch']} sequences "
        f"of {about['tokens']} tokens; share is of the read limit",
        *_left([(one.name, one.why) for one in found.left_out]),
    ]
    return ([table] if found.members else []), lines + ([f"results   {found.path}"] if found.path else [])


def recommended(found: Recommendation) -> tuple[list[Table], list[str]]:
    """The scheme that is named beside its neighbours, and why; its spec."""
    table = _table("scheme", f"{found.about['model']}, {found.about['text']}, {found.budget:g} bits", ("role",))
    shown: list[Beside] = [found.chosen, *found.beside]
    for one in shown:
        table.add_row(one.figured.name, *_cells(one.figured), one.role)
    lines = [f"why       {why}" for why in found.why]
    lines += _left([(one.name, one.why) for one in found.left_out])
    lines += ["", f"# {found.chosen.figured.name}", *found.scheme.to_toml().splitlines()]
    return [table], lines + ([f"saved     {found.path}"] if found.path else [])


def _table(head: str, title: str, more: Sequence[str]) -> Table:
    from rich.table import Table

    table = Table(head, *(name for name, _ in _CELLS.values()), *more, title=title)
    for column in table.columns[1 : 1 + len(_CELLS)]:
        column.justify = "right"
    return table


def _cells(one: Figured) -> list[str]:
    values = [(one.figures.get(name), form) for name, (_, form) in _CELLS.items()]
    return ["" if value is None else form.format(value) for value, form in values]


def _full(members: Iterable[Figured]) -> str:
    known = [x for one in members if (x := one.figures.get("full_perplexity")) is not None]
    return f"{known[0]:.2f}" if known else "unknown"


def _left(found: Sequence[tuple[str, str]]) -> list[str]:
    lines = [f"left out  {name}: {why.splitlines()[0]}" for name, why in found[:MOST]]
    return lines + ([f"left out  and {len(found) - MOST} more; --json has them"] if len(found) > MOST else [])
