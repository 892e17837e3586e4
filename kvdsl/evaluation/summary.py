"""Rows put together: means over windows and prompts, standard errors, intervals by the bootstrap."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .results import Cell, Continuation, Copy, Greedy, Interval, Layers, Perplexity, Retrieval, Tasks, Window
from .settings import Settings
from .units import RETRIEVAL, Unit

LEVEL = 0.95
Row = Mapping[str, Any]
Pairs = Sequence[tuple[Unit, Row]]


def interval(
    count: int, of: Callable[[Sequence[int]], float], seed: int, resamples: int, level: float = LEVEL
) -> Interval | None:
    """The middle `level` of what `of` gives for `count` indices drawn from as many with replacement, `resamples` times;
    the same for a seed.  None of fewer than two: they tell nothing of how places differ.
    """
    if count < 2:
        return None
    rng = random.Random(f"bootstrap {seed}")
    found = sorted(of(rng.choices(range(count), k=count)) for _ in range(resamples))
    low = (1 - level) / 2 * (len(found) - 1)
    return found[math.floor(low)], found[math.ceil(len(found) - 1 - low)]


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean; None of fewer than two."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    return statistics.stdev(values) / math.sqrt(len(values))


def mean(values: Sequence[float]) -> float:
    """The mean, or NaN of none."""
    return math.fsum(values) / len(values) if values else math.nan


def tasks_of(pairs: Pairs, settings: Settings, decode: Callable[[list[int]], str]) -> Tasks:
    """Every task that there are rows of."""
    by_task = dict[str, list[tuple[Unit, Row]]]()
    for unit, row in pairs:
        by_task.setdefault(unit.task, []).append((unit, row))
    found: dict[str, Any] = {}
    for task, some in by_task.items():
        if task == "perplexity":
            found[task] = perplexity(some, settings)
        elif task in RETRIEVAL:
            found[task] = retrieval(some)
        elif task == "copy":
            found[task] = copied(some)
        elif task == "greedy":
            found[task] = continued(some, settings, decode)
        else:
            found[task] = by_layer(some[0][1], settings)
    return Tasks(**found)


def perplexity(pairs: Pairs, settings: Settings) -> Perplexity:
    """All windows have as many tokens, so the mean over windows is the mean over tokens."""
    rows = [row for _, row in pairs]
    lost, full = ([row[name] for row in rows] for name in ("nll", "full_nll"))
    kl, same = ([mean(row[name]) for row in rows] for name in ("kl", "same"))

    def of(which: Sequence[float]) -> Callable[[Sequence[int]], float]:
        return lambda chosen: _exp(mean([which[i] for i in chosen]))

    def more(chosen: Sequence[int]) -> float:
        return of(lost)(chosen) - of(full)(chosen)

    def middle(what: Callable[[Sequence[int]], float]) -> Interval | None:
        return interval(len(rows), what, settings.seed, settings.resamples)

    everywhere = range(len(rows))
    return Perplexity(
        context=settings.context,
        score=settings.score,
        chunk=settings.chunk,
        perplexity=of(lost)(everywhere),
        full_perplexity=of(full)(everywhere),
        delta=more(everywhere),
        interval=middle(of(lost)),
        full_interval=middle(of(full)),
        delta_interval=middle(more),
        kl=mean(kl),
        kl_error=standard_error(kl),
        same=mean(same),
        same_error=standard_error(same),
        windows=tuple(
            Window(unit.about["start"], row["nll"], row["full_nll"], own, equal)
            for (unit, row), own, equal in zip(pairs, kl, same, strict=True)
        ),
        kl_by_place=tuple(mean(each) for each in zip(*(row["kl"] for row in rows), strict=True)),
    )


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def retrieval(pairs: Pairs) -> Retrieval:
    """By length and depth, and over all prompts.  An answer is exact where every token of it is the likeliest."""
    groups = dict[tuple[int, float], list[Row]]()
    for unit, row in pairs:
        groups.setdefault((unit.about["length"], unit.about["depth"]), []).append(row)
    cells = tuple(Cell(*place, **_answers(rows)) for place, rows in groups.items())
    return Retrieval(**_answers([row for _, row in pairs]), cells=cells)


def _answers(rows: Sequence[Row]) -> dict[str, Any]:
    return {
        "prompts": len(rows),
        "exact": mean([row["hit"] == 1 for row in rows]),
        "full_exact": mean([row["full_hit"] == 1 for row in rows]),
        **_losses(rows),
    }


def _losses(rows: Sequence[Row]) -> dict[str, float]:
    return {
        "nll": mean([row["nll"] for row in rows]),
        "full_nll": mean([row["full_nll"] for row in rows]),
        "kl": mean([mean(row["kl"]) for row in rows]),
    }


def copied(pairs: Pairs) -> Copy:
    """The mean over passages."""
    rows = [row for _, row in pairs]
    accuracy, full = (mean([row[name] for row in rows]) for name in ("hit", "full_hit"))
    tokens = sum(len(row["kl"]) for row in rows)
    return Copy(prompts=len(rows), tokens=tokens, accuracy=accuracy, full_accuracy=full, **_losses(rows))


def continued(pairs: Pairs, settings: Settings, decode: Callable[[list[int]], str]) -> Greedy:
    """Every continuation with its text."""
    rows = [row for _, row in pairs]
    return Greedy(
        prompts=len(rows),
        tokens=settings.new,
        same=mean([row["same"] for row in rows]),
        first=mean([len(row["tokens"]) if row["first"] is None else row["first"] for row in rows]),
        equal=mean([row["first"] is None for row in rows]),
        continuations=tuple(
            Continuation(
                unit.about["start"], row["same"], row["first"], decode(row["tokens"]), decode(row["full_tokens"])
            )
            for unit, row in pairs
        ),
    )


def by_layer(row: Row, settings: Settings) -> Layers:
    """The arrays, and the means of two."""
    grids: dict[str, Any] = {
        name: tuple(map(tuple, row[name]))
        for name in ("output", "score", "score_outlier", "score_other", "key", "key_outlier", "key_other", "value",
                     "outliers")
    }  # fmt: skip
    output, score = (_mean_of(grids[name]) for name in ("output", "score"))
    return Layers(settings.context, settings.queries, mean_output=output, mean_score=score, **grids)


def _mean_of(grid: Sequence[Sequence[float | None]]) -> float | None:
    numbers = [x for row in grid for x in row if x is not None]
    return mean(numbers) if numbers else None
