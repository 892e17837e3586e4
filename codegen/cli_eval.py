"""`kvdsl eval` and `kvdsl report`: their options, and in which order things are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import answer
from .arguments import AsJson, BackendName, Model, of_a_model, several


def evaluate(
    model: Model,
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME...", help="schemes to evaluate")] = None,
    all_: Annotated[
        bool, typer.Option("--all", help="every shipped and registered scheme that fits the model")
    ] = False,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="a text file; or botchan, a novel, the default; or code")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(metavar="LIST", help="of perplexity,passkey,needle,copy,greedy,layers; default all")
    ] = None,
    windows: Annotated[int | None, typer.Option(help="places of the text to score; default 5", min=1)] = None,
    context: Annotated[int | None, typer.Option(help="tokens of a window's prompt; default 896", min=1)] = None,
    score: Annotated[int | None, typer.Option(help="tokens scored behind it; default 128", min=1)] = None,
    chunk: Annotated[
        int | None, typer.Option(help="of them, put in at a time, which see each other exactly; default 32", min=1)
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(metavar="T,T", help="tokens of prompts that hide a key; default 512,1024")
    ] = None,
    seed: Annotated[int, typer.Option(help="of places, keys and intervals", min=0)] = 0,
    full: Annotated[bool, typer.Option("--full", help="more of all: windows, lengths, depths, prompts")] = False,
    backend: Annotated[BackendName | None, typer.Option(help="triton or torch; default by the model's device")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="keeps what is measured as it comes; go on where it ends; results.json, report.html"
        ),
    ] = None,
    workers: Annotated[
        int, typer.Option(help="processes that share the schemes, each with a model in memory", min=1)
    ] = 1,
    rows_only: Annotated[bool, typer.Option("--rows-only", hidden=True)] = False,
    json: AsJson = False,
) -> None:
    """How good a model is through packed caches, beside full precision: perplexity and divergence of a text, keys
    found in prompts, passages copied, greedy agreement, errors layer by layer, bytes by what they hold."""
    from .eval_workers import kept, measured_by, repeated
    from .evaluating import RESULTS, found_by, reported, settings_of, told

    schemes = several("eval", names, all_)
    with of_a_model():
        asked = settings_of(full, tasks, lengths, windows=windows, context=context, score=score, chunk=chunk, seed=seed)
        given: dict[str, Any] = dict(backend=backend.value if backend else None, leave_out=all_ or rows_only)
        with answer.progress("evaluating") as say, kept(out, workers) as folder:
            if workers > 1 and not rows_only:
                options = repeated(
                    model=model, text=text, tasks=tasks, windows=windows, context=context, score=score, chunk=chunk,
                    lengths=lengths, seed=seed, full=full, backend=given["backend"], out=folder,
                )  # fmt: skip
                measured_by(workers, list(schemes), options, folder, say)
            found = found_by(schemes, model, text, asked, folder, say, written=not rows_only, **given)
    if rows_only:
        return
    report = None if out is None else reported(out)
    if json:
        answer.document(found.to_dict())
        return
    tables, lines = told(found)
    if out is not None:
        lines += [f"results   {out / RESULTS}", *([f"report    {report}"] if report else [])]
    answer.told(tables, lines)


def report(
    results: Annotated[Path, typer.Argument(metavar="FOLDER", help="of `kvdsl eval --out`, or a results.json")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="the page to write; default report.html beside the results")
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="A100, H100, H200 or B200: predicts times from machine code compiled here"),
    ] = None,
    json: AsJson = False,
) -> None:
    """The report of an evaluation from its results alone: one page of HTML with plots and tables, which loads
    nothing."""
    from .report import REPORT, needed, read, write

    needed()
    with of_a_model(), answer.progress("drawing"):
        found = read(results)
        path = out if out is not None else (results if results.is_dir() else results.parent) / REPORT
        write(found, path, gpu=gpu)
    if json:
        answer.document({"report": str(path), "schemes": [one.scheme for one in found.results]})
    else:
        print(f"report    {path}")
