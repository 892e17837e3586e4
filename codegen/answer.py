"""How the command line speaks: a document or lines on stdout, a message or progress on stderr."""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


def document(data: Any) -> None:
    """One JSON document on stdout.  Infinities and NaN become null: they are no JSON."""
    print(json.dumps(finite(data), indent=2, ensure_ascii=False, allow_nan=False))


def finite(data: Any) -> Any:
    """The data with None where a number is not finite."""
    if isinstance(data, dict):
        return {str(key): finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def lines(texts: Iterable[str]) -> None:
    """Plain lines on stdout."""
    print("\n".join(texts))


def headline(text: str) -> None:
    """A heading: bold where the terminal can."""
    if sys.stdout.isatty() and "NO_COLOR" not in os.environ:
        text = f"\033[1m{text}\033[0m"
    print(text)


def columns(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Rows as aligned columns; those numbered in `right` end at one edge.  The last column is never padded."""
    sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = []
    for row in rows:
        cells = [
            cell.rjust(size) if i in right else cell.ljust(size)
            for i, (cell, size) in enumerate(zip(row, sizes, strict=True))
        ]
        aligned.append("  ".join(cells).rstrip())
    return aligned


def table(rows: Table) -> None:
    """A table on stdout, as wide as it is where no terminal bounds it."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 200).print(rows)


def told(tables: Iterable[Table], texts: Iterable[str]) -> None:
    """Tables, and the lines behind them."""
    for one in tables:
        table(one)
    lines(texts)


def row(texts: Iterable[str]) -> str:
    """A row of a table of Markdown."""
    return "| " + " | ".join(texts) + " |"


def table_of(heads: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A table of Markdown whose first columns are words."""
    rule = row(["---"] * left + ["---:"] * (len(heads) - left))
    return "\n".join([row(heads), rule, *map(row, rows)])


def complain(message: str) -> None:
    """One message on stderr."""
    print(f"kvdsl: {message}", file=sys.stderr)


@contextmanager
def progress(text: str) -> Iterator[Callable[[str], None]]:
    """A spinner on stderr while something long runs, where stderr is a terminal; nothing elsewhere.  What is yielded
    tells how far it is."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console

    with Console(stderr=True).status(text) as status:
        yield lambda more: status.update(f"{text}: {more}")


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Inside, a warning is one line on stderr, without the line of source that raised it."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: complain(f"warning: {message}")
        yield
