"""A model through packed caches, scheme beside scheme: `kvdsl eval`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvdsl.kernels import Backend
from kvdsl.scheme import Scheme

from . import answer
from .arguments import text_of
from .running import quiet

if TYPE_CHECKING:
    from rich.table import Table

    from kvdsl.evaluation.results import Evaluation
    from kvdsl.evaluation.settings import Settings
    from kvdsl.evaluation.tables import Sheet

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


def reported(out: Path) -> Path | None:
    """Write the report of a folder's results beside them: where it is.  None, said on stderr, where what draws it is
    not installed."""
    from kvdsl.extras import MissingExtra

    from .report import REPORT, read, write

    try:
        write(read(out), out / REPORT)
    except MissingExtra as error:
        answer.complain(f"no report is drawn: {error}; then: kvdsl report {out}")
        return None
    return out / REPORT


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
    from kvdsl.evaluation.tables import bits, losses, remarks

    first, second = losses(found), bits(found)
    tables = [_table(first, first.title), _table(second)] if first.rows else []
    return tables, [f"{kind:8s}  {text}" for kind, text in remarks(found)]


def _table(sheet: Sheet, title: str | None = None) -> Table:
    from rich.table import Table

    table = Table(*sheet.heads, title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in sheet.rows:
        table.add_row(*row)
    return table
