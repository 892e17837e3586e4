"""Figures of docs/questions.md, read from what was measured, and its tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from kvdsl.evaluation.summary import interval, standard_error

Row = Mapping[str, Any]
RESAMPLES = 2000


class Question:
    """What was measured for one question."""

    def __init__(self, found: Mapping[str, Any]) -> None:
        self.about, self.settings = found["about"], found["settings"]
        self.full: list[float] = found["full_nll"]
        self.members: list[Row] = found["members"]

    def rows(self, **axes: Any) -> list[Row]:
        """The members of these names, seed after seed."""
        return [one for one in self.members if all(one[name] == value for name, value in axes.items())]

    def one(self, **axes: Any) -> Row:
        """The one that there is."""
        (found,) = self.rows(**axes)
        return found

    @property
    def full_perplexity(self) -> float:
        return math.exp(fmean(self.full))

    def told(self, command: str) -> str:
        """What was run, in a sentence or two."""
        a, s = self.about, self.settings
        versions = ", ".join(f"{name} {version}" for name, version in a["versions"].items())
        heads = f"{a['q_heads']} query heads, {a['kv_heads']} kv heads of {a['head_dim']} channels"
        heads = f"{a['q_heads']} query heads, {a['kv_heads']} kv heads of {a['head_dim']} channels"
        return (
            f"Made by `{command}`: {a['model']} (digest {a['digest']}, {a['layers']} layers, {heads}) in {a['dtype']}, "
            f"the {a['backend']} backend; text {a['text']}, sha256 {a['sha256'][:16]}..., {s['windows']} windows (seed "
            f"{s['seed']}) of {s['context']} tokens packed and {s['score']} scored in chunks of {s['chunk']}; "
            f"perplexity in full precision {self.full_perplexity:.2f}; {versions}."
        )


def kl(row: Row) -> float:
    """KL of a token in nats."""
    return fmean(row["kl"])


def perplexity(row: Row) -> float:
    return math.exp(fmean(row["nll"]))


def score(row: Row) -> float:
    """Relative error of scores, mean over layers and heads."""
    return float(row["score_error"])


Measure = Callable[[Row], float]


def number(value: float) -> str:
    """Three digits, no more than four places, or two digits and a power of ten."""
    if 0 < value < 0.001:
        return f"{value:.1e}"
    if value >= 1000:
        return f"{value:.0f}"
    places = 1 if value >= 100 else 2 if value >= 10 else 3 if value >= 0.1 else 4
    return f"{value:.{places}f}"


def mean(rows: Iterable[Row], measure: Measure) -> float:
    """Over seeds."""
    return fmean(map(measure, rows))


def spread(rows: Sequence[Row], measure: Measure) -> float:
    """Over seeds, the sample's standard deviation; 0 of one."""
    return stdev(map(measure, rows)) if len(rows) > 1 else 0.0


def over_seeds(rows: Sequence[Row], measure: Measure) -> str:
    """Mean and standard deviation, or the number of one run, or nothing of none."""
    if not rows:
        return ""
    middle = number(mean(rows, measure))
    return middle if len(rows) == 1 else f"{middle} ± {number(spread(rows, measure))}"


def with_error(row: Row) -> str:
    """KL with its standard error over windows."""
    error = standard_error(row["kl"])
    return number(kl(row)) if error is None else f"{number(kl(row))} ± {number(error)}"


def with_interval(question: Question, row: Row) -> str:
    """Perplexity, and the interval of what it is above full precision."""
    lost, full = row["nll"], question.full

    def more(chosen: Sequence[int]) -> float:
        return math.exp(fmean(lost[i] for i in chosen)) - math.exp(fmean(full[i] for i in chosen))

    found = interval(len(lost), more, question.settings["seed"], RESAMPLES)
    return f"{perplexity(row):.2f}" + ("" if found is None else f" ({found[0]:+.2f} to {found[1]:+.2f})")
