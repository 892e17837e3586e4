"""What an evaluation found as tables of text: the terminal, notebooks and the report print the same ones."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from .results import Evaluation, Grid, Retrieval, SchemeResult

NOT_FINITE = "not finite"


@dataclass(frozen=True)
class Sheet:
    """A table: a row begins with the scheme's name."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def done(found: Evaluation) -> list[SchemeResult]:
    """The schemes that have figures."""
    return [one for one in found.results if one.refused is None]


def finite(number: float | None) -> bool:
    """Whether there is such a number: JSON has null for infinities and NaN."""
    return number is not None and math.isfinite(number)


def shown(number: float | None, form: str) -> str:
    """A number in a format, or that it is not finite."""
    return format(number, form) if number is not None and math.isfinite(number) else NOT_FINITE


def losses(found: Evaluation) -> Sheet:
    """What is lost, a row a scheme behind one of full precision."""
    some = done(found)
    rows = [dict(_cells(one, full=False)) for one in some]
    heads = tuple(dict.fromkeys(head for row in rows for head in row))
    full = dict(_cells(some[0], full=True)) if some else {}
    first = ("full precision", "", *(full.get(head, "") for head in heads))
    others = (
        (one.scheme, "" if one.bits is None else shown(one.bits, ".3f"), *(row.get(head, "") for head in heads))
        for one, row in zip(some, rows, strict=True)
    )
    return Sheet(f"{found.model}, {found.text}", ("scheme", "bits", *heads), (first, *others) if some else ())


def _cells(one: SchemeResult, *, full: bool) -> Iterator[tuple[str, str]]:
    """The columns of the tasks that were asked: (head, cell), of a scheme or of full precision beside it."""
    tasks = one.tasks
    if (text := tasks.perplexity) is not None:
        number, around = (text.full_perplexity, text.full_interval) if full else (text.perplexity, text.interval)
        ends = f" ({shown(around[0], '.1f')} to {shown(around[1], '.1f')})" if around else ""
        yield "perplexity", shown(number, ".2f") + ends
        if not full:
            yield "delta", shown(text.delta, "+.2f")
            yield "KL", _with_error(text.kl, text.kl_error)
            yield "same", shown(text.same, ".0%")
    for name, keys in retrievals(one):
        exact, nll = (keys.full_exact, keys.full_nll) if full else (keys.exact, keys.nll)
        yield name, f"{shown(exact, '.0%')}, {shown(nll, '.2f')}"
    if (copy := tasks.copy) is not None:
        yield "copy", shown(copy.full_accuracy if full else copy.accuracy, ".0%")
    if (more := tasks.greedy) is not None and not full:
        yield "greedy", f"{shown(more.same, '.0%')}, first {shown(more.first, '.1f')}"
    if (layers := tasks.layers) is not None and not full:
        told = [x for x in (layers.mean_output, layers.mean_score) if x is not None]
        yield "error of outputs, scores", ", ".join(shown(x, ".3f") for x in told)


def _with_error(number: float, error: float | None) -> str:
    return shown(number, ".4f") + (f" ± {shown(error, '.4f')}" if error is not None else "")


def retrievals(one: SchemeResult) -> list[tuple[str, Retrieval]]:
    """The tasks that hide a key, those that were asked."""
    asked = (("passkey", one.tasks.passkey), ("needle", one.tasks.needle))
    return [(name, keys) for name, keys in asked if keys is not None]


def bits(found: Evaluation) -> Sheet:
    """Bits an element: all bytes of a sequence so long, and beside them what the spec counts."""
    known = [(one.scheme, one.storage) for one in done(found) if one.storage is not None]
    lengths = list(dict.fromkeys(size.tokens for _, storage in known for size in storage.sizes))
    rows = []
    for name, storage in known:
        sizes = {
            size.tokens: f"{shown(size.bits, '.2f')} ({shown(size.counted.mean, '.2f')})" for size in storage.sizes
        }
        rows.append((name, *(sizes.get(tokens, "") for tokens in lengths)))
    head = "bits, all bytes held (counted)"
    return Sheet("bits an element by tokens of a sequence", (head, *map(str, lengths)), tuple(rows))


def keys_found(found: Evaluation, task: str) -> Sheet:
    """Share of answers that are exact, and their loss, by length and depth."""
    known = [(one.scheme, keys) for one in done(found) for name, keys in retrievals(one) if name == task]
    places = sorted({(cell.length, cell.depth) for _, keys in known for cell in keys.cells if finite(cell.depth)})
    rows = []
    if known:
        cells = {
            (c.length, c.depth): f"{shown(c.full_exact, '.0%')}, {shown(c.full_nll, '.2f')}" for c in known[0][1].cells
        }
        rows.append(("full precision", *(cells.get(place, "") for place in places)))
    for name, keys in known:
        cells = {(c.length, c.depth): f"{shown(c.exact, '.0%')}, {shown(c.nll, '.2f')}" for c in keys.cells}
        rows.append((name, *(cells.get(place, "") for place in places)))
    heads = (f"{length} tokens, depth {depth:g}" for length, depth in places)
    return Sheet(f"{task}: answers that are exact, loss of their tokens", ("scheme", *heads), tuple(rows))


def layer_errors(found: Evaluation, what: str) -> Sheet:
    """The mean over kv heads of one of the arrays of `Layers`, a column a layer."""
    known = [(one.scheme, one.tasks.layers) for one in done(found) if one.tasks.layers is not None]
    grids: list[tuple[str, Grid]] = [(name, getattr(layers, what)) for name, layers in known]
    count = max((len(grid) for _, grid in grids), default=0)
    rows = tuple((name, *(_mean(row) for row in grid), *[""] * (count - len(grid))) for name, grid in grids)
    return Sheet(
        f"relative error of {what}s, mean over kv heads", ("scheme", *(f"layer {i}" for i in range(count))), rows
    )


def _mean(row: tuple[float | None, ...]) -> str:
    numbers = [x for x in row if x is not None]
    return shown(math.fsum(numbers) / len(numbers), ".3f") if numbers else "none"


def remarks(found: Evaluation) -> list[tuple[str, str]]:
    """How it was measured, and what was left out: (note, sentence) and (left out, scheme and why)."""
    lines = [("note", note) for note in found.notes]
    for one in found.results:
        if one.refused is not None:
            first, *others = one.refused.splitlines() or [""]
            more = f"; and {len(others)} more" if others else ""
            lines.append(("left out", f"{one.scheme}: {first}{more}"))
    return lines
