"""A model through packed caches, scheme beside scheme: `kvdsl eval`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvdsl.kernels import Backend
from kvdsl.scheme import Scheme

from . import answer
from .arguments import text_of
from .running import quiet

if TYPE_CHECKING:
    from rich.table import Table

    from kvdsl.evaluation.results import Evaluation, SchemeResult
    from kvdsl.evaluation.settings import Settings

RESULTS = "results.json"


def settings_of(full: bool, tasks: str | None, lengths: str | None, **numbers: int | None) -> Settings:
    """The settings of a command's options.  ValueError names one that is wrong."""
    from kvdsl.evaluation.settings import FULL, Settings

    return (FULL if full else Settings()).with_(
        tasks=None if tasks is None else _listed(tasks),
        lengths=None if lengths is None else _numbers("lengths", lengths),
        **numbers,
    )


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(name: str, text: str) -> list[int]:
    try:
        return [int(part) for part in _listed(text)]
    except ValueError:
        raise ValueError(f"{name}: {text!r} is no list of whole numbers; give some, as 512,1024") from None


def found_by(
    schemes: Mapping[str, Scheme],
    model: str,
    text: Path | None,
    settings: Settings,
    out: Path | None,
    say: Callable[[str], None],
    *,
    backend: Backend | None,
    leave_out: bool,
    written: bool = True,
) -> Evaluation:
    """What kvdsl.evaluate finds; with a folder also, where it is to be written, in its results.json.  Interrupted, it
    says that rows are kept."""
    from kvdsl.evaluation.run import evaluate
    from kvdsl.evaluation.settings import ROWS

    words, name = named_text(text)
    quiet()
    options: dict[str, Any] = dict(settings=settings, backend=backend, out=out, leave_out=leave_out, say=say)
    try:
        found = evaluate(schemes, model, text=words, text_name=name, **options)
    except KeyboardInterrupt:
        if out is not None:
            answer.complain(f"what was measured is in {out / ROWS}; the same command goes on from there")
        raise
    if out is not None and written:
        part = out / f".{RESULTS}.part"
        part.write_text(json.dumps(answer.finite(found.to_dict()), indent=1, ensure_ascii=False), encoding="utf-8")
        os.replace(part, out / RESULTS)
    return found


def named_text(path: Path | None) -> tuple[str, str]:
    """A text and its name: of a file, or of one that kvdsl.models.text knows."""
    from kvdsl.models import text as texts

    known = {"botchan": texts.botchan, "code": texts.code}
    name = "botchan" if path is None else str(path)
    if name in known and (path is None or not path.exists()):
        return known[name](), name
    return text_of(path), Path(name).name


def told(found: Evaluation) -> tuple[list[Table], list[str]]:
    """Tables for the terminal, a row a scheme: what is lost, and bits over lengths; then how it was measured."""
    done = [one for one in found.results if one.refused is None]
    lines = [f"note      {note}" for note in found.notes]
    for one in found.results:
        if one.refused is not None:
            first, *others = one.refused.splitlines()
            lines.append(f"left out  {one.scheme}: {first}" + (f"; and {len(others)} more" if others else ""))
    return ([_losses(found, done), _bits(done)] if done else []), lines


def _losses(found: Evaluation, done: list[SchemeResult]) -> Table:
    from rich.table import Table

    rows = [dict(_cells(one, full=False)) for one in done]
    heads = [*rows[0]]
    title = f"{found.model}, {found.text}"
    table = Table("scheme", "bits", *heads, title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("full precision", "", *(dict(_cells(done[0], full=True)).get(head, "") for head in heads))
    for one, row in zip(done, rows, strict=True):
        table.add_row(one.scheme, "" if one.bits is None else f"{one.bits:.3f}", *row.values())
    return table


def _cells(one: SchemeResult, *, full: bool) -> Iterator[tuple[str, str]]:
    """The columns of the tasks that were asked: (head, cell), of a scheme or of full precision beside it."""
    tasks = one.tasks
    if (text := tasks.perplexity) is not None:
        number, around = (text.full_perplexity, text.full_interval) if full else (text.perplexity, text.interval)
        yield "perplexity", f"{number:.2f}" + (f" ({around[0]:.1f} to {around[1]:.1f})" if around else "")
        if not full:
            yield "delta", f"{text.delta:+.2f}"
            yield "KL", _with_error(text.kl, text.kl_error)
            yield "same", f"{text.same:.0%}"
    for name, keys in (("passkey", tasks.passkey), ("needle", tasks.needle)):
        if keys is not None:
            exact, nll = (keys.full_exact, keys.full_nll) if full else (keys.exact, keys.nll)
            yield name, f"{exact:.0%}, {nll:.2f}"
    if (copy := tasks.copy) is not None:
        yield "copy", f"{copy.full_accuracy if full else copy.accuracy:.0%}"
    if (more := tasks.greedy) is not None and not full:
        yield "greedy", f"{more.same:.0%}, first {more.first:.1f}"
    if (layers := tasks.layers) is not None and not full:
        told = [x for x in (layers.mean_output, layers.mean_score) if x is not None]
        yield "error of outputs, scores", ", ".join(f"{x:.3f}" for x in told)


def _with_error(number: float, error: float | None) -> str:
    return f"{number:.4f}" + (f" ± {error:.4f}" if error is not None else "")


def _bits(done: list[SchemeResult]) -> Table:
    """Bits an element: all bytes of a sequence so long, and beside them what the spec counts."""
    from rich.table import Table

    known = [(one.scheme, one.storage) for one in done if one.storage is not None]
    lengths = [size.tokens for size in known[0][1].sizes]
    table = Table("bits, all bytes held (counted)", *map(str, lengths))
    for column in table.columns[1:]:
        column.justify = "right"
    for name, storage in known:
        table.add_row(name, *(f"{size.bits:.2f} ({size.counted.mean:.2f})" for size in storage.sizes))
    return table
