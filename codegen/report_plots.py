"""Figures of an evaluation: bits against quality, quality with intervals, bits over lengths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvdsl.evaluation.results import Evaluation, Interval
from kvdsl.evaluation.tables import done, finite, shown
from kvdsl.search_pairs import front as places

from .report_svg import FAINT, INK, MARKERS, SERIES, Drawn, canvas, listed, short, svg_of

NAMED = 16  # more schemes than these are named only on the front
LINEAR = 1e-3  # divergences below it are drawn on a linear scale, as they may be 0


@dataclass(frozen=True)
class Point:
    """A scheme with what it costs and what it loses; `around`: the ends of the interval of what it loses."""

    name: str
    cost: float
    loss: float
    around: Interval | None = None


def front(points: Sequence[Point]) -> list[Point]:
    """Those that no other one beats: none costs as little or less and loses less, by rising cost."""
    return [points[place] for place in places([(one.cost, one.loss) for one in points])]


def divergences(found: Evaluation, costs: dict[str, float]) -> list[Point]:
    """KL by cost, with a standard error to either side."""
    points = []
    for one in done(found):
        if (text := one.tasks.perplexity) is not None and finite(text.kl) and one.scheme in costs:
            error = text.kl_error
            around = (text.kl - error, text.kl + error) if error is not None and finite(error) else None
            points.append(Point(one.scheme, costs[one.scheme], text.kl, around))
    return points


def perplexities(found: Evaluation, costs: dict[str, float]) -> list[Point]:
    """Perplexity by cost, with its interval."""
    points = []
    for one in done(found):
        if (text := one.tasks.perplexity) is not None and finite(text.perplexity) and one.scheme in costs:
            points.append(Point(one.scheme, costs[one.scheme], text.perplexity, _known(text.interval)))
    return points


def _known(around: Interval | None) -> Interval | None:
    return around if around is not None and all(map(finite, around)) else None


def bits_of(found: Evaluation) -> dict[str, float]:
    """Bits an element by scheme, those that are known."""
    return {one.scheme: one.bits for one in done(found) if one.bits is not None and math.isfinite(one.bits)}


def fronts(found: Evaluation) -> list[Drawn]:
    """Bits against divergence and against perplexity."""
    costs = bits_of(found)
    drawn = [
        pareto(
            "bits-kl", "Bits and divergence", divergences(found, costs), "bits an element, everything included",
            "KL from full precision, nats a token", "bars are standard errors over windows", divergence=True,
        ),
        pareto(
            "bits-perplexity", "Bits and perplexity", perplexities(found, costs),
            "bits an element, everything included", "perplexity", "bars are intervals of 95 %", full=_full(found),
        ),
    ]  # fmt: skip
    return [one for one in drawn if one is not None]


def _full(found: Evaluation) -> float | None:
    texts = [one.tasks.perplexity for one in done(found) if one.tasks.perplexity is not None]
    return texts[0].full_perplexity if texts and finite(texts[0].full_perplexity) else None


def pareto(
    name: str, title: str, points: Sequence[Point], across: str, up: str, about: str, *,
    divergence: bool = False, full: float | None = None,
) -> Drawn | None:  # fmt: skip
    """A scatter of schemes with the front as a line; None of no points.  `divergence`: upwards on a scale that is
    logarithmic but near 0; `full`: what full precision loses, as a line."""
    if not points:
        return None
    best = front(points)
    told = listed([f"{p.name} ({p.cost:.3g}; {p.loss:.4g})" for p in best])
    alt = f"Scatter of {len(points)} schemes, {across} against {up}; on the front: {told}."
    with canvas(7.6, 4.6, name) as figure:
        axes = figure.subplots()
        axes.grid(True)
        axes.set_axisbelow(True)
        others = [point for point in points if point not in best]
        for some, colour, marker, label in ((others, INK, "o", "other schemes"), (best, SERIES[1], "D", "front")):
            if some:
                at, losses = [p.cost for p in some], [p.loss for p in some]
                axes.errorbar(at, losses, yerr=_bars(some), fmt="none", ecolor=colour, elinewidth=0.8, alpha=0.7)
                axes.scatter(at, losses, marker=marker, s=26, color=colour, label=label, zorder=3)
        axes.step([p.cost for p in best], [p.loss for p in best], where="post", color=SERIES[1], linewidth=1.2)
        if full is not None:
            axes.axhline(full, color=SERIES[2], linewidth=1, linestyle="--", label="full precision")
        if divergence:
            axes.set_yscale("symlog", linthresh=LINEAR)
            _decades(axes.yaxis, between=max(p.loss for p in points) <= 1)
        elif max(p.loss for p in points) > 3 * min(p.loss for p in points) > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
        if len(points) > NAMED and min(p.cost for p in points) > 0:
            axes.set_xscale("log", base=2)  # most of many stand at few bits
            axes.xaxis.set_major_formatter("{x:g}")
        for number, point in enumerate(points if len(points) <= NAMED else best):
            place = (5, 4) if number % 2 == 0 else (5, -10)
            axes.annotate(
                short(point.name), (point.cost, point.loss), xytext=place, textcoords="offset points", fontsize=8
            )
        axes.margins(x=0.12)
        axes.set_xlabel(across)
        axes.set_ylabel(up)
        axes.legend(fontsize=8)
        svg = svg_of(figure, name, alt)
    unnamed = "" if len(points) <= NAMED else "; schemes off the front are named in the tables"
    return Drawn(name, title, f"{about}{unnamed}", alt, svg)


def _decades(axis: Any, *, between: bool) -> None:
    """Ticks of a scale that is linear near 0: 0, decades, and what lies between them where there is room."""
    from matplotlib.ticker import FixedLocator

    steps = (1, 3) if between else (1,)
    axis.set_major_locator(FixedLocator([0, *(m * 10.0**power for power in range(-3, 4) for m in steps)]))
    axis.set_major_formatter("{x:g}")


def _bars(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    ends = [point.around or (point.loss, point.loss) for point in points]
    low = [max(0.0, p.loss - end[0]) for p, end in zip(points, ends, strict=True)]
    return low, [max(0.0, end[1] - p.loss) for p, end in zip(points, ends, strict=True)]


def quality(found: Evaluation) -> Drawn | None:
    """Every scheme's divergence and what its perplexity is more, with their intervals, by rising divergence."""
    rows = [
        (one.scheme, text)
        for one in done(found)
        if (text := one.tasks.perplexity) is not None and finite(text.kl) and finite(text.delta)
    ]
    if not rows:
        return None
    rows.sort(key=lambda row: -row[1].kl)
    names, places = [short(name) for name, _ in rows], list(range(len(rows)))
    told = listed([f"{name} {text.kl:.4g}; {text.delta:+.4g}" for name, text in reversed(rows)])
    alt = f"KL and difference of perplexity by scheme, least first: {told}."
    kl = [
        Point(name, 0, t.kl, None if t.kl_error is None else (t.kl - t.kl_error, t.kl + t.kl_error)) for name, t in rows
    ]
    more = [Point(name, 0, t.delta, _known(t.delta_interval)) for name, t in rows]
    with canvas(8.4, 1.4 + 0.24 * len(rows), "quality") as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, points, label in ((left, kl, "KL, standard errors"), (right, more, "more perplexity, 95 %")):
            axes.grid(True, axis="x")
            at = [p.loss for p in points]
            axes.errorbar(at, places, xerr=_bars(points), fmt="none", ecolor=SERIES[0], elinewidth=1.4, capsize=2.5)
            axes.scatter(at, places, color=SERIES[0], s=20, zorder=3)
            axes.axvline(0, color=FAINT, linewidth=1)
            axes.set_xlabel(label)
            axes.set_yticks(places, names)
            axes.set_ylim(-0.7, len(rows) - 0.3)
        left.set_xscale("symlog", linthresh=LINEAR)
        _decades(left.xaxis, between=False)
        if max(abs(p.loss) for p in more) > 20:
            right.set_xscale("symlog", linthresh=1)
            right.xaxis.set_major_formatter("{x:g}")
        svg = svg_of(figure, "quality", alt)
    about = "KL from full precision with its standard error, and what the perplexity is above that of full precision"
    return Drawn("quality", "Quality by scheme", about, alt, svg)


def lengths(found: Evaluation) -> Drawn | None:
    """Bits an element over the length of a sequence: all bytes that are held, and what the spec counts."""
    rows = [(one, one.storage.sizes) for one in done(found) if one.storage is not None and one.storage.sizes]
    if not rows:
        return None
    tokens = sorted({size.tokens for _, sizes in rows for size in sizes})
    last = listed([f"{one.scheme} {shown(sizes[-1].bits, '.2f')}" for one, sizes in rows])
    alt = f"Bits an element by tokens of a sequence, from {tokens[0]} to {tokens[-1]}; at the longest: {last}."
    columns = 1 + (len(rows) - 1) // 20
    with canvas(7.6 + 1.6 * columns, 4.4, "lengths") as figure:
        axes = figure.subplots()
        axes.grid(True)
        lines = []
        for number, (_, sizes) in enumerate(rows):
            colour, marker = SERIES[number % len(SERIES)], MARKERS[number % len(MARKERS)]
            at = [size.tokens for size in sizes]
            style: dict[str, Any] = dict(color=colour, linewidth=1.2)
            lines += axes.plot(at, [_or_nan(s.bits) for s in sizes], marker=marker, markersize=4.5, **style)
            axes.plot(at, [_or_nan(s.counted.mean) for s in sizes], linestyle=":", **style)
        axes.set_xscale("log", base=2)
        axes.set_xticks(tokens, [str(n) for n in tokens])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("tokens of a sequence")
        axes.set_ylabel("bits an element")
        names = [short(one.scheme) for one, _ in rows]
        figure.legend(lines, names, loc="outside right upper", fontsize=8, ncols=columns)
        svg = svg_of(figure, "lengths", alt)
    about = "lines: all bytes that are held, what is reserved included; dots: what the spec counts"
    return Drawn("lengths", "Bits by context length", about, alt, svg)


def _or_nan(number: float | None) -> float:
    return math.nan if number is None else number
