"""`kvdsl sweep` and `kvdsl recommend`: their options, and in which order things are refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from . import answer
from .arguments import AsJson, BackendName, Model, of_a_model, refuse
from .evaluating import named_text
from .running import quiet

Text = Annotated[
    Path | None, typer.Option(metavar="FILE", help="a text file; or botchan, a novel, the default; or code")
]
Workers = Annotated[int, typer.Option(help="processes that share the schemes, each with a model in memory", min=1)]
EngineName = Annotated[str, typer.Option(help="local, or ray: the cluster of RAY_ADDRESS, or one of this machine")]
GpuName = Annotated[str, typer.Option(metavar="NAME", help="whose time is predicted: A100, H100, H200 or B200")]
Backend = Annotated[BackendName | None, typer.Option(help="triton or torch; default by the model's device")]


def sweep(
    grid: Annotated[
        str,
        typer.Argument(metavar="GRID", help="a .toml file with base, axes and beside; or a NAME to put --axis onto"),
    ],
    model: Model,
    axis: Annotated[
        list[str] | None,
        typer.Option(metavar="PLACE=V,V", help="a place of the spec and its values, as bits=2,3,4; repeatable"),
    ] = None,
    text: Text = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="an SQLite file; keeps what is measured as it comes; go on where it ends"),
    ] = None,
    sample: Annotated[
        int | None, typer.Option(help="measure so many combinations, drawn at random, in place of all", min=1)
    ] = None,
    windows: Annotated[int | None, typer.Option(help="places of the text to score; default 3", min=1)] = None,
    context: Annotated[int | None, typer.Option(help="tokens of a window's prompt; default 896", min=1)] = None,
    score: Annotated[int | None, typer.Option(help="tokens scored behind it; default 128", min=1)] = None,
    chunk: Annotated[int | None, typer.Option(help="of them, put in at a time; default 32", min=1)] = None,
    seed: Annotated[int, typer.Option(help="of places, and of the sample", min=0)] = 0,
    workers: Workers = 1,
    engine: EngineName = "local",
    gpu: GpuName = "H100",
    tokens: Annotated[int, typer.Option(help="of a sequence whose reading is predicted", min=1)] = 32768,
    batch: Annotated[int, typer.Option(help="sequences of so many tokens", min=1)] = 8,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="predict from machine code, or from bytes alone")
    ] = True,
    backend: Backend = None,
    json: AsJson = False,
) -> None:
    """A grid of schemes through packed caches of a model: bits, perplexity and divergence of every member, predicted
    time of reading, and which of them no other dominates. What is no scheme is told with the rule's sentence."""
    from .sweep_run import grid_of, usual
    from .sweep_run import sweep as swept
    from .sweep_told import swept as told

    with of_a_model():
        asked = _with_axes(grid_of(grid), axis or ())
        settings = usual().with_(windows=windows, context=context, score=score, chunk=chunk, seed=seed)
        words, name = named_text(text)
        options: dict[str, Any] = dict(
            out=out, sample=sample, seed=seed, workers=workers, engine=engine, gpu=gpu, tokens=tokens, batch=batch,
            compiled=compiled, backend=backend.value if backend else None,
        )  # fmt: skip
        quiet()
        with _kept(out), answer.progress("sweeping") as say:
            found = swept(asked, model, text=words, text_name=name, settings=settings, say=say, **options)
    if json:
        answer.document(found.to_dict())
        return
    answer.told(*told(found))


@contextmanager
def _kept(file: Path | None) -> Iterator[None]:
    """Interrupted, it says where rows are."""
    try:
        yield
    except KeyboardInterrupt:
        if file is not None:
            answer.complain(f"what was measured is in {file} and {file}.rows; the same command goes on from there")
        raise


def _with_axes(grid: Any, axes: Any) -> Any:
    from dataclasses import replace

    from kvdsl.sweeping.grid import axis

    return replace(grid, axes=(*grid.axes, *((place, tuple(values)) for place, values in map(axis, axes))))


def recommend(
    bits: Annotated[float, typer.Option(help="a number may take at most, metadata included")],
    model: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="a folder in the transformers format, a GGUF file, or smollm2"),
    ] = None,
    from_: Annotated[
        Path | None, typer.Option("--from", metavar="FILE", help="a sweep's file: choose of it, measure nothing")
    ] = None,
    among: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="a candidate; repeatable; default all that are known")
    ] = None,
    text: Text = None,
    tokens: Annotated[
        int | None, typer.Option(help="count bits of a sequence so long, window included; default without end", min=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="of places of the text", min=0)] = 0,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="the .toml or .json file to write")] = None,
    keep: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="an SQLite file; keeps what is measured as it comes; go on where it ends"),
    ] = None,
    workers: Workers = 1,
    engine: EngineName = "local",
    gpu: GpuName = "H100",
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="predict from machine code, or from bytes alone")
    ] = False,
    backend: Backend = None,
    json: AsJson = False,
) -> None:
    """The scheme within a budget of bits through which a model loses least, beside the next best, a cheaper one and one
    beyond the budget, and why: of all that are known, looked at briefly and the best of them at length, or of a
    sweep."""
    from .recommending import recommend as found_by
    from .sweep_told import recommended as told

    if model is None and from_ is None:
        refuse("recommend: give --model, or --from with the file of a sweep")
    with of_a_model():
        words, name = (None, "") if from_ is not None else named_text(text)
        quiet()
        with _kept(keep), answer.progress("looking") as say:
            found = found_by(
                model, bits=bits, text=words, text_name=name, sweep=from_, among=among or None, tokens=tokens,
                seed=seed, out=out, keep=keep, workers=workers, engine=engine, gpu=gpu, compiled=compiled,
                backend=backend.value if backend else None, say=say,
            )  # fmt: skip
    if json:
        answer.document(found.to_dict())
        return
    answer.told(*told(found))
