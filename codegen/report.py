"""The report of an evaluation: one page of HTML that needs nothing else, made from results alone."""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from kvdsl.evaluation.results import Evaluation
from kvdsl.evaluation.settings import FULL, Settings
from kvdsl.evaluation.tables import Sheet, bits, done, keys_found, layer_errors, losses, remarks
from kvdsl.extras import need
from kvdsl.markup import Html, facts, table

from . import report_maps, report_plots, report_times
from .evaluating import RESULTS
from .report_svg import Drawn
from .roofline import card

REPORT = "report.html"
TEMPLATE = "report.html"
SCHEMES = 6  # of a title; the others are counted
WHATS = ("output", "score")


@dataclass(frozen=True)
class Tabled:
    """A table and what it is called where its caption is not seen."""

    title: str
    html: Html


@dataclass(frozen=True)
class Section:
    """A part of the page, top to bottom; `told`: its tables are of words, not of numbers."""

    name: str
    title: str
    texts: tuple[str, ...] = ()
    figures: tuple[Drawn, ...] = ()
    tables: tuple[Tabled, ...] = ()
    passages: tuple[tuple[str, str], ...] = ()
    told: bool = False


def needed() -> None:
    """MissingExtra where what draws the page is not installed."""
    need("matplotlib", "plot")
    need("jinja2", "plot")


def read(path: Path) -> Evaluation:
    """The results in a file, or in a folder of `kvdsl eval --out`.  ValueError for what is none."""
    file = path / RESULTS if path.is_dir() else path
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: {error}; give a results.json of `kvdsl eval --out`") from None
    return Evaluation.from_dict(found)


def write(found: Evaluation, path: Path, *, gpu: str | None = None) -> None:
    """Write the page, all of it or nothing."""
    text = page(found, gpu=gpu)
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def page(found: Evaluation, *, gpu: str | None = None) -> str:
    """The page.  With the name of a GPU times are predicted from machine code, else from bytes alone.  MissingExtra
    without matplotlib, ValueError for a GPU that is not known."""
    needed()
    template = resources.files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8")
    environment = need("jinja2", "plot").Environment(autoescape=True)
    title = f"What packed caches lose: {found.model}, {found.text}"
    text: str = environment.from_string(template).render(
        title=title, summary=_summary(found), sections=sections(found, gpu)
    )
    return text


def _summary(found: Evaluation) -> str:
    names = [one.scheme for one in done(found)]
    told = ", ".join(names[:SCHEMES]) + (f" and {len(names) - SCHEMES} more" if len(names) > SCHEMES else "")
    return f"Beside full precision: {told or 'no scheme'}."


def sections(found: Evaluation, gpu: str | None) -> list[Section]:
    """Everything on the page that there are figures for."""
    retrieval = [task for task in ("passkey", "needle") if keys_found(found, task).rows]
    times, timed = _times(found, gpu), report_times
    made = [
        Section(
            "losses", "What is lost", figures=_some(*report_plots.fronts(found), report_plots.quality(found)),
            tables=_tables(losses(found)),
        ),
        Section(
            "bits", "Bits by context length", figures=_some(report_plots.lengths(found)), tables=_tables(bits(found))
        ),
        Section(
            "time", "Time of a step",
            figures=_some(timed.plot(found, times)) if times else (), tables=_tables(times.sheet()) if times else (),
        ),
        Section(
            "layers", "Errors by layer and head", figures=_some(*(report_maps.errors(found, one) for one in WHATS)),
            tables=_tables(*(layer_errors(found, one) for one in WHATS)),
        ),
        Section(
            "keys", "Keys found", figures=_some(*(report_maps.keys(found, task) for task in retrieval)),
            tables=_tables(*(keys_found(found, task) for task in retrieval)),
        ),
        Section("greedy", "Greedy continuations", passages=_continuations(found)),
    ]  # fmt: skip
    kept = [one for one in made if one.figures or one.tables or one.passages]
    return [*kept, _measured(found)]


def _times(found: Evaluation, gpu: str | None) -> report_times.Times | None:
    if gpu is None:
        return report_times.of_bytes(found, card(report_times.USUAL))
    return report_times.of_code(found, card(gpu))


def _some(*drawn: Drawn | None) -> tuple[Drawn, ...]:
    return tuple(one for one in drawn if one is not None)


def _tables(*sheets: Sheet) -> tuple[Tabled, ...]:
    return tuple(Tabled(one.title, table(one.heads, one.rows, one.title)) for one in sheets if one.rows)


def _continuations(found: Evaluation) -> tuple[tuple[str, str], ...]:
    """Of every scheme the text that it continues a prompt by, and that of full precision."""
    passages = []
    for one in done(found):
        for each in one.tasks.greedy.continuations if one.tasks.greedy is not None else ():
            first = "no other token" if each.first is None else f"{each.first} tokens before the first other one"
            both = f"{one.scheme}:\n{each.text}\n\nfull precision:\n{each.full_text}"
            passages.append((f"{one.scheme}, from token {each.start}: {first}", both))
    return tuple(passages)


def _measured(found: Evaluation) -> Section:
    """How it was measured: model, text, seed, versions, settings, the command."""
    model, text = found.about_model, found.about_text
    about = [
        ("model", f"{model.name}, {model.kind}, digest {model.digest}"),
        ("shape", f"{model.layers} layers, {model.q_heads} query heads, {model.kv_heads} kv heads of {model.head_dim}"),
        ("numbers", f"{model.dtype} on {model.device}"),
        ("text", f"{text.name}, sha256 {text.sha256}"),
        ("tokens", f"{text.tokens}, scored from {text.scored_from}"),
        ("seed", str(found.settings.get("seed"))),
        *((f"version of {name}", str(version)) for name, version in found.versions.items()),
        ("command", command(found)),
    ]
    asked = [(name, _said(value)) for name, value in found.settings.items()]
    schemes = [
        (one.scheme, "; ".join(filter(None, [
            f"spec {one.hash}", one.source, f"backend {one.backend}" if one.backend else "",
            f"calibrated {', '.join(one.calibrated)}" if one.calibrated else "",
            f"bits of keys {one.storage.keys}, of values {one.storage.values}" if one.storage else "",
        ])))
        for one in found.results
    ]  # fmt: skip
    pairs = (("What was run", about), ("What was asked", asked), ("Schemes", schemes))
    tables = tuple(Tabled(title, facts(some, title)) for title, some in pairs)
    texts = tuple(text if kind == "note" else f"{kind}: {text}" for kind, text in remarks(found))
    return Section("measured", "How it was measured", texts, tables=tables, told=True)


def _said(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def command(found: Evaluation) -> str:
    """The command that asks the same, of a model and a text under their names; what only Python can ask is said."""
    asked = {name: _said(value) for name, value in found.settings.items()}
    usual, more = ({name: _said(x) for name, x in one.to_dict().items()} for one in (Settings(), FULL))
    options = {"tasks", "windows", "context", "score", "chunk", "lengths", "seed"}
    other = {True: _others(asked, more), False: _others(asked, usual)}
    full = len(other[True]) < len(other[False])
    words = ["kvdsl", "eval", *(one.scheme for one in found.results), "--model", found.model, "--text", found.text]
    words += ["--full"] if full else []
    for name in sorted(other[full] & options):
        words += [f"--{name}", asked[name].replace(", ", ",")]
    rest = sorted(other[full] - options)
    return shlex.join(words) + (
        f"; in Python also {', '.join(f'{name} {asked[name]}' for name in rest)}" if rest else ""
    )


def _others(asked: dict[str, str], usual: dict[str, str]) -> set[str]:
    return {name for name, value in asked.items() if usual.get(name) != value}
