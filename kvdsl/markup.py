"""HTML from plain values, every text of them escaped: tables for notebooks, and for the report of an evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


class Html(str):
    """Text that is HTML already: `element` and templates that escape take it as it is."""

    __slots__ = ()

    def __html__(self) -> str:
        return self


def element(tag: str, *inside: str, **attributes: str) -> Html:
    """One element.  Attributes are named as in Python: `class_`, `aria_label`."""
    given = "".join(f' {name.rstrip("_").replace("_", "-")}="{escape(text)}"' for name, text in attributes.items())
    return Html(f"<{tag}{given}>{''.join(one if isinstance(one, Html) else escape(one) for one in inside)}</{tag}>")


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "") -> Html:
    """A table whose rows begin with their names."""
    above = element("thead", element("tr", *(element("th", head, scope="col") for head in heads)))
    below = element("tbody", *map(_row, rows))
    return element("table", *([element("caption", caption)] if caption else []), above, below)


def facts(pairs: Iterable[tuple[str, str]], caption: str = "") -> Html:
    """A table of two columns and no head: what is told, and what of it."""
    return element("table", *([element("caption", caption)] if caption else []), element("tbody", *map(_row, pairs)))


def _row(cells: Sequence[str]) -> Html:
    name, *others = cells
    return element("tr", element("th", name, scope="row"), *(element("td", cell) for cell in others))
