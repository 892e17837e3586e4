"""Maps of an evaluation: errors by layer and head, keys found by depth and length; a panel a scheme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from kvdsl.evaluation.results import Cell, Evaluation, Grid
from kvdsl.evaluation.tables import done, finite, retrievals

from .report_svg import FAINT, Drawn, canvas, listed, short, svg_of

ACROSS = 4  # panels beside each other
SHADES = 32
SPREAD = 10.0  # of errors, from which on they are drawn on a logarithmic scale
CROWDED = 30.0  # from which on only powers of ten are told beside it
BRIGHT = 0.55  # of a shade, above which text on it is black


def errors(found: Evaluation, what: str) -> Drawn | None:
    """One of the arrays of `Layers`, such as "output", by layer and kv head; one scale for all schemes."""
    grids: list[tuple[str, Grid]] = [
        (one.scheme, getattr(one.tasks.layers, what)) for one in done(found) if one.tasks.layers is not None
    ]
    known = {name: [x for row in grid for x in row if x is not None and math.isfinite(x)] for name, grid in grids}
    numbers = [x for some in known.values() for x in some]
    if not numbers:
        return None
    means = listed([f"{name} {math.fsum(some) / len(some):.3g}" for name, some in known.items() if some])
    alt = f"Relative errors of {what}s by layer and kv head, a panel a scheme; means: {means}."
    name = f"errors-{what}"
    rows, columns = _panels(len(grids))
    heads = max(len(row) for _, grid in grids for row in grid)
    with canvas(2.3 * columns + 1, rows * (0.9 + min(1.6, 0.12 * heads)) + 0.5, name) as figure:
        from matplotlib import colormaps, colors
        from matplotlib.ticker import NullFormatter

        shades = colormaps["viridis"].resampled(SHADES)
        positive = [x for x in numbers if x > 0]
        scale: Any = colors.Normalize(min(0.0, *numbers), max(numbers) or 1.0)
        if positive and max(positive) > SPREAD * min(positive):
            scale = colors.LogNorm(max(min(positive), max(positive) / 1e4), max(positive), clip=True)
        panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for axes, (scheme, grid) in zip(panels.flat, grids, strict=False):
            values = [[_number(grid[layer], head) for layer in range(len(grid))] for head in range(heads)]
            mesh = axes.pcolormesh(values, cmap=shades, norm=scale, edgecolors="face", linewidth=0.2)
            axes.set_title(short(scheme), fontsize=8)
        _count(panels[0, 0].xaxis, max(len(grid) for _, grid in grids))  # of all panels: they share axes
        _count(panels[0, 0].yaxis, heads)
        _named(panels, len(grids), "layer", "kv head")
        bar = figure.colorbar(mesh, ax=panels.ravel().tolist(), shrink=0.9)
        bar.outline.set_edgecolor(FAINT)
        bar.ax.yaxis.set_major_formatter("{x:g}")
        few = not positive or max(positive) < CROWDED * min(positive)
        bar.ax.yaxis.set_minor_formatter("{x:g}" if few else NullFormatter())
        bar.set_label("relative error")
        svg = svg_of(figure, name, alt)
    about = (
        "each layer on exact keys, values and queries, so that nothing adds up over layers; empty where none is known"
    )
    return Drawn(name, f"Errors of {what}s by layer and head", about, alt, svg)


def _number(row: Sequence[float | None], head: int) -> float:
    value = row[head] if head < len(row) else None
    return math.nan if value is None else value


def keys(found: Evaluation, task: str) -> Drawn | None:
    """Share of answers that are exact by length and depth, full precision first."""
    known = [(one.scheme, some.cells) for one in done(found) for name, some in retrievals(one) if name == task]
    known = [(name, tuple(cell for cell in cells if finite(cell.depth))) for name, cells in known]
    known = [(name, cells) for name, cells in known if cells]
    if not known:
        return None
    first = known[0][1]
    lengths = sorted({cell.length for _, cells in known for cell in cells})
    depths = sorted({cell.depth for _, cells in known for cell in cells})
    maps = [("full precision", _shares(first, full=True))]
    maps += [(name, _shares(cells, full=False)) for name, cells in known]
    told = listed([f"{name} {math.fsum(some.values()) / len(some):.0%}" for name, some in maps if some])
    alt = f"{task}: share of answers that are exact by length and depth of the key, a panel a scheme; means: {told}."
    name = f"keys-{task}"
    rows, columns = _panels(len(maps))
    with canvas(2.3 * columns + 1, rows * (0.9 + 0.3 * len(depths)) + 0.5, name) as figure:
        from matplotlib import colormaps, colors

        shades, scale = colormaps["viridis"].resampled(SHADES), colors.Normalize(0, 1)
        panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for axes, (scheme, shares) in zip(panels.flat, maps, strict=False):
            values = [[shares.get((length, depth), math.nan) for length in lengths] for depth in depths]
            mesh = axes.pcolormesh(values, cmap=shades, norm=scale, edgecolors="face", linewidth=0.2)
            axes.set_title(short(scheme), fontsize=8)
            for (length, depth), share in shares.items():
                place = lengths.index(length) + 0.5, depths.index(depth) + 0.5
                colour = "#000000" if share > BRIGHT else "#ffffff"
                axes.text(*place, f"{share:.0%}", color=colour, ha="center", va="center", fontsize=8)
        panels[0, 0].set_xticks([i + 0.5 for i in range(len(lengths))], [str(n) for n in lengths])
        panels[0, 0].set_yticks([i + 0.5 for i in range(len(depths))], [f"{depth:g}" for depth in depths])
        panels[0, 0].set_ylim(len(depths), 0)  # the beginning of a prompt is above
        _named(panels, len(maps), "tokens", "depth")
        bar = figure.colorbar(mesh, ax=panels.ravel().tolist(), shrink=0.9)
        bar.outline.set_edgecolor(FAINT)
        bar.ax.yaxis.set_major_formatter("{x:.0%}")
        svg = svg_of(figure, name, alt)
    return Drawn(name, f"Keys found: {task}", "share of prompts whose answer is exact", alt, svg)


def _shares(cells: Sequence[Cell], *, full: bool) -> dict[tuple[int, float], float]:
    shares = {(cell.length, cell.depth): cell.full_exact if full else cell.exact for cell in cells}
    return {place: share for place, share in shares.items() if share is not None}


def _panels(count: int) -> tuple[int, int]:
    return math.ceil(count / ACROSS), min(count, ACROSS)


def _count(axis: Any, count: int) -> None:
    """Ticks in the middle of cells, few enough to be read."""
    step = max(1, math.ceil(count / 8))
    places = range(0, count, step)
    axis.set_ticks([place + 0.5 for place in places], [str(place) for place in places])


def _named(panels: Any, count: int, across: str, up: str) -> None:
    """Labels at the edges alone, and nothing where there is no panel."""
    rows, columns = panels.shape
    for number, axes in enumerate(panels.flat):
        axes.tick_params(labelsize=7)
        if number >= count:
            axes.set_axis_off()
        elif number % columns == 0:
            axes.set_ylabel(up, fontsize=8)
        if number < count <= number + columns:
            axes.tick_params(labelbottom=True)
            axes.set_xlabel(across, fontsize=8)
