"""What `kvdsl bench` found, drawn: bits an element to the right, speed upwards, and what memory allows as a line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kvdsl.errors import ShapeError
from kvdsl.extras import need

KINDS = (".svg", ".png", ".pdf")
# Told apart without colours too: a marker a shape; Okabe and Ito's colours.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vP*"
Row = Mapping[str, Any]


def refuse_plot(path: Path | None) -> None:
    """Before anything is measured: ShapeError for a file of no kind that can be drawn, MissingExtra where matplotlib is
    missing."""
    if path is None:
        return
    if path.suffix.lower() not in KINDS:
        raise ShapeError(f"plot: {path} is none of {', '.join(KINDS)}; give such a name")
    if not path.absolute().parent.is_dir():
        raise ShapeError(f"plot: there is no folder {path.absolute().parent}; make it, or give another one")
    need("matplotlib", "plot")


def drawn(found: Mapping[str, Any], path: Path) -> None:
    """Write the plot: on a GPU bytes a second and times over SDPA; without one what machine code predicts."""
    figure = need("matplotlib.figure", "plot").Figure(figsize=(11, 5), layout="constrained")
    need("matplotlib.backends.backend_agg", "plot").FigureCanvasAgg(figure)
    if found["read_limit_gbps"] is None:
        _foretold(figure.subplots(), found)
    else:
        left, right = figure.subplots(1, 2)
        _rates(left, found)
        _speedups(right, found)
    figure.savefig(path)


def _rates(axes: Any, found: Mapping[str, Any]) -> None:
    """Bytes a second of schemes and peers, those that machine code predicts, and the read limit."""
    _points(axes, found, "gbps")
    axes.axhline(found["read_limit_gbps"], color="black", linewidth=1, label="read limit")
    known = [row for row in found["predicted"] if row.get("share") is not None]
    if known:
        at, limits = [row["bits"] for row in known], [row["share"] * found["read_limit_gbps"] for row in known]
        axes.scatter(at, limits, marker="_", s=150, color="grey", label="predicted from machine code")
    axes.set_ylabel("GB/s")
    axes.set_ylim(bottom=0)
    _finished(axes, found["device"])


def _speedups(axes: Any, found: Mapping[str, Any]) -> None:
    """Times over SDPA on float16 numbers, and what bits alone would make of it."""
    rows = _points(axes, found, "speedup_fp16")
    if rows:
        least = min(row["bits"] for row in rows)
        widths = [least * (16 / least) ** (i / 50) for i in range(51)]
        axes.plot(widths, [16 / width for width in widths], color="black", linewidth=1, label="16 / bits")
    axes.set_ylabel("times over SDPA, float16")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    _finished(axes, "")


def _points(axes: Any, found: Mapping[str, Any], what: str) -> list[Row]:
    """Schemes filled, peers empty; a colour and a marker a shape, and a name beside the first."""
    rows = [row for row in (*found["results"], *found["peers"]) if row.get(what) is not None]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    for number, shape in enumerate(shapes):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        for kind, face in (("scheme", colour), ("peer", "none")):
            some = [row for row in rows if row["shape"] == shape and kind in row]
            if some:
                label = shape if kind == "scheme" else f"{shape}, other systems"
                at, up = [row["bits"] for row in some], [row[what] for row in some]
                axes.scatter(at, up, marker=marker, facecolors=face, edgecolors=colour, label=label)
    _named(axes, ((_name(row), row["bits"], row[what]) for row in rows if row["shape"] == shapes[0]))
    return rows


def _name(row: Row) -> str:
    return str(row.get("scheme") or row["peer"])


def _foretold(axes: Any, found: Mapping[str, Any]) -> None:
    """Bytes a second that machine code predicts of each GPU, under a line for what its memory allows."""
    rows = [row for row in found["predicted"] if row.get("gbps") is not None]
    for number, gpu in enumerate(dict.fromkeys(row["gpu"] for row in rows)):
        some, colour = [row for row in rows if row["gpu"] == gpu], COLOURS[number % len(COLOURS)]
        at, up = [row["bits"] for row in some], [row["gbps"] for row in some]
        axes.scatter(at, up, marker=MARKERS[number % len(MARKERS)], color=colour, label=gpu)
        limit = some[0]["gbps"] / some[0]["share"]
        axes.axhline(limit, color=colour, linewidth=1, label=f"read limit of {gpu}")
        _named(axes, zip((row["scheme"] for row in some), at, up, strict=True))
    axes.set_ylabel("GB/s, predicted from machine code")
    axes.set_ylim(bottom=0)
    _finished(axes, "no GPU: nothing here was measured")


def _named(axes: Any, points: Iterable[tuple[str, float, float]]) -> None:
    for name, x, y in points:
        axes.annotate(name, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7)


def _finished(axes: Any, title: str) -> None:
    axes.set_xlabel("bits an element, metadata included")
    axes.set_title(title)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=7)
