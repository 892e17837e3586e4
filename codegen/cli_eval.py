"""`kvdsl eval`: its options, and in which order things are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
        typer.Option(metavar="FOLDER", help="keeps what is measured as it comes; go on where it ends; results.json"),
    ] = None,
    json: AsJson = False,
) -> None:
    """How good a model is through packed caches, beside full precision: perplexity and divergence of a text, keys
    found in prompts, passages copied, greedy agreement, errors layer by layer, bytes by what they hold."""
    from .evaluating import found_by, settings_of, told

    schemes = several("eval", names, all_)
    with of_a_model():
        asked = settings_of(full, tasks, lengths, windows=windows, context=context, score=score, chunk=chunk, seed=seed)
        with answer.progress("evaluating") as say:
            found = found_by(schemes, model, text, asked, backend.value if backend else None, out, say, leave_out=all_)
    if json:
        answer.document(found.to_dict())
        return
    tables, lines = told(found)
    for table in tables:
        answer.table(table)
    answer.lines(lines if out is None else [*lines, f"results   {out / 'results.json'}"])
