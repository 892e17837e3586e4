"""A figure of matplotlib as SVG inside a page: its colours are the page's variables, so that it is readable in light
and dark, its text is text, its ids are its own.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

from kvdsl.extras import need
from kvdsl.markup import Html

# Colours that stand for the page's variables; those of series are Okabe and Ito's.
INK, FAINT = "#1c1c21", "#c9c9cf"
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b98000", "#2f9fd8", "#6a5acd")
MARKERS = "osD^vP*X"
VARIABLES = {INK: "--ink", FAINT: "--faint", **{colour: f"--series-{i}" for i, colour in enumerate(SERIES)}}
STYLE = {
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "figure.facecolor": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "legend.facecolor": "none",
    "legend.edgecolor": FAINT,
    "legend.labelcolor": INK,
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "text.color": INK,
    "text.parse_math": False,  # a dollar in a name is a dollar
    "xtick.color": INK,
    "ytick.color": INK,
}
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
LISTED = 16  # schemes in an alternative text
LONGEST = 28  # characters of a name in a figure; tables have all of it


@dataclass(frozen=True)
class Drawn:
    """A figure: its name in the page, its title, what it shows for who reads it and for who cannot see it."""

    name: str
    title: str
    about: str
    alt: str
    svg: Html


@contextmanager
def canvas(width: float, height: float, name: str) -> Iterator[Any]:
    """A figure of matplotlib, in inches, whatever the user's own style is.  MissingExtra without matplotlib."""
    matplotlib = need("matplotlib", "plot")
    figure = need("matplotlib.figure", "plot").Figure
    with warnings.catch_warnings(), matplotlib.rc_context():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # it is the page's fonts that show it
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({**STYLE, "svg.hashsalt": name})
        yield figure(figsize=(width, height), layout="constrained")


def svg_of(figure: Any, name: str, alt: str) -> Html:
    """The figure as an element of a page; to be called inside of `canvas`."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata=NO_METADATA)
    return adopted(file.getvalue(), name, alt)


def adopted(svg: str, name: str, alt: str) -> Html:
    """SVG as matplotlib writes it, for a page that holds several: without prolog, with ids and colours of the page.
    What stands between tags, names of schemes, stays as it is."""
    svg = re.sub(r"<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r"\s*\n\s*", "\n", re.sub("<[^>]*>", lambda tag: _adopted(tag[0], name), svg))
    return Html(svg.strip().replace("<svg", f'<svg role="img" aria-label="{escape(alt)}"', 1))


def _adopted(tag: str, name: str) -> str:
    tag = re.sub(r'\bid="([^"]*)"', rf'id="{name}-\1"', tag)
    tag = re.sub(r'\bhref="#', f'href="#{name}-', tag).replace("url(#", f"url(#{name}-")
    tag = re.sub(r"font-family: [^;\"]*; ", "", tag)  # the page has its own
    return re.sub("#[0-9a-f]{6}", lambda found: _coloured(found[0]), tag)


def _coloured(colour: str) -> str:
    return f"var({VARIABLES[colour]})" if colour in VARIABLES else colour


def listed(parts: Sequence[str]) -> str:
    """What an alternative text lists: not more than can be listened to."""
    told = ", ".join(parts[:LISTED])
    return told if len(parts) <= LISTED else f"{told} and {len(parts) - LISTED} more, which the tables have"


def short(name: str) -> str:
    """A name that leaves room for what is drawn."""
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"
