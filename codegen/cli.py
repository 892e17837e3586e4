"""The command line: what a user can ask of a scheme without writing Python.

Exit status 0: done; 1: a check failed; 2: wrong use or a bad spec, with one message on stderr.  Everything heavy is
imported inside the command that needs it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvdsl.errors import BackendError, ProofError, SchemeError, ShapeError

from . import answer
from .arguments import (
    AsJson,
    BackendName,
    Dtype,
    HeadDim,
    InputFormatName,
    KvHeads,
    Model,
    Name,
    QHeads,
    Refused,
    Stage,
    UsageError,
    label,
    loaded,
    of_a_model,
    refuse,
    several,
    text_of,
)
from .cli_eval import evaluate, report
from .cli_sweep import recommend, sweep

if TYPE_CHECKING:
    from kvdsl.scheme import Scheme
    from kvdsl.shape import Shape

DONE, FAILED, WRONG, INTERRUPTED = 0, 1, 2, 130
app = typer.Typer(
    name="kvdsl",
    help="State how a KV cache is quantized; read, check and run what is generated from it.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command: the exit status.  No traceback reaches the user for anything that a user can cause."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with answer.plain_warnings():
            status = _command()(given, standalone_mode=False, prog_name="kvdsl")
        return status if isinstance(status, int) else DONE
    except typer.Exit as exit_:
        return exit_.exit_code
    except UsageError as error:
        where = f"; see `{error.ctx.command_path} --help`" if error.ctx else ""
        answer.complain(error.format_message().rstrip(".") + where)
    except (typer.Abort, KeyboardInterrupt):
        answer.complain("interrupted")
        return INTERRUPTED
    except OSError as error:
        answer.complain(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
    except (Refused, SchemeError, ShapeError, BackendError, ProofError, ImportError) as error:
        answer.complain(str(error))
        if isinstance(error, ProofError) or hasattr(error, "failures"):
            return FAILED  # a lowering that is not proven, a kernel that does not compile
    return WRONG


@cache
def _command() -> Any:
    """All commands, made once: their signatures are read for it."""
    return typer.main.get_command(app)


def _shape(
    scheme: Scheme, head_dim: int | None, kv_heads: int | None, q_heads: int | None, dtype: InputFormatName
) -> Shape:
    from kvdsl.shape import Shape, usual

    found = usual(scheme)
    heads = found.kv_heads if kv_heads is None else kv_heads
    return Shape(head_dim or found.head_dim, heads, q_heads or found.group * heads, dtype.value)


@app.command("list")
def list_(json: AsJson = False) -> None:
    """Every scheme: name, system, source, bits per element of keys, values and both (head_dim 128, no window)."""
    from .listing import rows

    found = rows()
    if json:
        answer.document(found)
        return
    table = [("name", "system", "keys", "values", "mean", "source")]
    for row in found:
        bits = [f"{row['bits'][side]:.3f}" for side in ("keys", "values", "mean")]
        table.append((row["name"], row["system"], *bits, row["source"]))
    answer.lines(answer.columns(table, right=(2, 3, 4)))


@app.command()
def show(
    name: Name,
    stage: Annotated[Stage | None, typer.Option(help="one stage; default all, without the source")] = None,
    head_dim: HeadDim = None,
    kv_heads: KvHeads = None,
    q_heads: QHeads = None,
    dtype: Dtype = InputFormatName.fp16,
    backend: Annotated[BackendName, typer.Option(help="whose source")] = BackendName.triton,
    tokens: Annotated[
        int | None,
        typer.Option(
            help="count the window of a sequence of so many tokens, and choose attention's form for it", min=1
        ),
    ] = None,
    json: AsJson = False,
) -> None:
    """One stage of the compiler, or all, as a person would want to read it."""
    from . import show as stages

    scheme = loaded(name)
    shape = _shape(scheme, head_dim, kv_heads, q_heads, dtype)
    view = stages.View(label(name, scheme), scheme, shape, backend.value, tokens)
    chosen = [stage.value] if stage else [s for s in stages.STAGES if json or s != "source"]
    told = {each: stages.show(view, each) for each in chosen}
    if json:
        answer.document({"scheme": view.name, "stages": {each: data for each, (data, _) in told.items()}})
        return
    for each, (_, texts) in told.items():
        if len(told) > 1:
            answer.headline(f"\n{view.name}: {each}\n")
        answer.lines(texts)


@app.command()
def emit(
    name: Name,
    out: Annotated[Path, typer.Option(metavar="DIR", help="folder for the file; made if it is not there")],
    backend: Annotated[BackendName, typer.Option(help="triton or torch")] = BackendName.triton,
    head_dim: HeadDim = None,
    kv_heads: KvHeads = None,
    q_heads: QHeads = None,
    dtype: Dtype = InputFormatName.fp16,
    json: AsJson = False,
) -> None:
    """Write the generated source, ready to read, import and step through."""
    from .emitting import emitted

    scheme = loaded(name)
    called, shape = label(name, scheme), _shape(scheme, head_dim, kv_heads, q_heads, dtype)
    files = emitted(scheme, shape, called, backend.value, out)
    if json:
        answer.document({"scheme": called, "backend": backend.value, "files": list(map(str, files))})
    else:
        answer.lines(list(map(str, files)))


@app.command("compile")
def compile_(
    name: Name,
    arch: Annotated[
        str, typer.Option(metavar="ARCHES", help="architectures, separated by commas")
    ] = "sm_80,sm_90,sm_100",
    head_dim: HeadDim = None,
    kv_heads: KvHeads = None,
    q_heads: QHeads = None,
    dtype: Dtype = InputFormatName.fp16,
    details: Annotated[bool, typer.Option("--details", help="what every kernel is made of, not decode alone")] = False,
    json: AsJson = False,
) -> None:
    """Compile ahead of time, with no GPU: registers, spills, instructions per packed byte by class, products against
    the fewest that do, loads by width, predicted share of the read limit."""
    from .compiling import compiled, told

    scheme = loaded(name)
    arches = [part.strip() for part in arch.split(",") if part.strip()]
    with answer.progress(f"compiling {name} for {', '.join(arches)}"):
        shape = _shape(scheme, head_dim, kv_heads, q_heads, dtype)
        path, kernels = compiled(scheme, shape, label(name, scheme), arches)
    if json:
        answer.document({"kernels": kernels, "path": str(path)})
        return
    answer.lines([*told(kernels, details=details), "", f"source {path}"])


@app.command()
def check(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME...", help="schemes to check")] = None,
    all_: Annotated[bool, typer.Option("--all", help="every shipped and registered scheme")] = False,
    examples: Annotated[int | None, typer.Option(help="examples a law", min=1)] = None,
    seed: Annotated[int | None, typer.Option(help="where the examples start")] = None,
    backend: Annotated[BackendName | None, typer.Option(help="triton or torch; default the live one")] = None,
    json: AsJson = False,
) -> None:
    """Property tests: every law that applies to a scheme.  Exit status 1 with the smallest counterexample."""
    from .checking import results, told

    schemes = several("check", names, all_)
    found = results(schemes, examples=examples, seed=seed, backend=backend.value if backend else None)
    if json:
        answer.document({"results": found})
    else:
        answer.lines(told(found))
    if not all(result["passed"] for result in found):
        raise typer.Exit(FAILED)


@app.command()
def study(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME...", help="schemes to study")] = None,
    all_: Annotated[bool, typer.Option("--all", help="every shipped and registered scheme")] = False,
    seeds: Annotated[int, typer.Option(help="seeds to draw with, where a scheme draws something", min=1)] = 20,
    backend: Annotated[BackendName | None, typer.Option(help="triton or torch; default the live one")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="the page docs/schemes.md")] = False,
    json: AsJson = False,
) -> None:
    """What is lost on fixed tensors: squared error of normal numbers, error of scores and outputs on keys with outlier
    channels; mean and standard deviation over the seeds of rotations and sketches."""
    from .studying import page, results, told

    found = results(several("study", names, all_), seeds=seeds, backend=backend.value if backend else None)
    if json:
        answer.document({"results": found})
    elif markdown:
        print(page(found))
    else:
        answer.table(told(found))


@app.command()
def bench(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME...", help="schemes to time")] = None,
    all_: Annotated[bool, typer.Option("--all", help="every shipped and registered scheme")] = False,
    shape: Annotated[
        list[str] | None, typer.Option(metavar="BxHxT", help="batch, kv heads, tokens; repeatable")
    ] = None,
    group: Annotated[int, typer.Option(help="query heads of a kv head", min=1)] = 4,
    head_dim: HeadDim = 128,
    peers: Annotated[
        bool, typer.Option("--peers/--no-peers", help="other systems' kernels beside, if installed")
    ] = True,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="bits and speed, drawn: .svg, .png or .pdf")] = None,
    json: AsJson = False,
) -> None:
    """Decode attention over a filled cache: time, shares of the read limit of this GPU, times over float16 attention,
    over unpacking first and over other systems, error against float64. Without a GPU what machine code predicts of
    four, and the ratios of the torch kernels."""
    from kvdsl.peers import known

    from .bench_plot import drawn, refuse_plot
    from .bench_told import told
    from .benching import results

    refuse_plot(plot)
    found = results(several("bench", names, all_), shape or (), group, head_dim or 128, known() if peers else ())
    if plot is not None:
        drawn(found, plot)
    if json:
        answer.document(found)
        return
    for table in told(found):
        answer.table(table)


@app.command()
def tune(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="schemes to tune")],
    head_dim: HeadDim = None,
    kv_heads: KvHeads = None,
    q_heads: QHeads = None,
    dtype: Dtype = InputFormatName.fp16,
    batch: Annotated[list[int] | None, typer.Option(help="sequences; repeatable; default 1 and 8", min=1)] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="of a sequence; repeatable; default 32768", min=1)] = None,
    json: AsJson = False,
) -> None:
    """Time the schedules of decode that the model of this GPU likes best, and such as fill it evenly, and keep the
    fastest: what is built from then on takes it for calls of about this size. Needs a GPU."""
    from .tuning import BATCHES, TOKENS, results, told

    schemes = {name: loaded(name) for name in names}

    def shape_of(scheme: Scheme) -> Shape:
        return _shape(scheme, head_dim, kv_heads, q_heads, dtype)

    found = results(schemes, shape_of, batch or BATCHES, tokens or TOKENS)
    if json:
        answer.document({"results": found})
    else:
        answer.lines(told(found))


@app.command()
def generate(
    name: Name,
    model: Model,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="what to continue")] = None,
    file: Annotated[Path | None, typer.Option(metavar="F", help="a text file to continue")] = None,
    tokens: Annotated[int, typer.Option(help="tokens to generate at most", min=1)] = 64,
    params: Annotated[Path | None, typer.Option(metavar="F", help="what `kvdsl calibrate` wrote")] = None,
    backend: Annotated[BackendName | None, typer.Option(help="triton or torch; default by the model's device")] = None,
    json: AsJson = False,
) -> None:
    """Greedy generation through the packed cache, beside full precision: text, agreement, bytes."""
    from .running import generated, told

    if (prompt is None) == (file is None):
        refuse("generate: give either --prompt TEXT or --file F")
    text = prompt if prompt is not None else text_of(file)
    scheme = loaded(name)
    with answer.progress(f"generating with {name} and in full precision"), of_a_model():
        found = generated(scheme, label(name, scheme), model, text, tokens, params, backend.value if backend else None)
    if json:
        answer.document(found)
    else:
        answer.lines(told(found))


app.command("eval")(evaluate)
app.command("report")(report)
app.command()(sweep)
app.command()(recommend)


@app.command()
def calibrate(
    name: Name,
    model: Model,
    text: Annotated[Path, typer.Option(metavar="FILE", help="a text of the kind the model will read")],
    out: Annotated[Path, typer.Option(metavar="F", help="the safetensors file to write")],
    tokens: Annotated[int, typer.Option(help="tokens of the text to read at most", min=1)] = 512,
    json: AsJson = False,
) -> None:
    """Measure what a scheme takes from data, layer by layer, and save it with the scheme's hash: scales and second
    levels, tables of levels, scales, shifts and orders of channels."""
    from .running import calibrated

    scheme, words = loaded(name), text_of(text)
    with answer.progress(f"calibrating {name}"), of_a_model():
        found = calibrated(scheme, model, words, out, tokens)
    if json:
        answer.document({"scheme": label(name, scheme), **found})
    else:
        print(f"{found['tensors']} tensors of {found['layers']} layers over {found['tokens']} tokens: {out}")


@app.command()
def search(
    name: Name,
    model: Model,
    text: Annotated[Path, typer.Option(metavar="FILE", help="a text of the kind the model will read")],
    bits: Annotated[float, typer.Option(help="a number may take at most, metadata included")],
    out: Annotated[Path, typer.Option(metavar="F", help="the .toml or .json file to write")],
    pairs: Annotated[str, typer.Option(metavar="B,B", help="bits that keys and values may have")] = "2,4,8",
    trials: Annotated[int, typer.Option(help="maps to try in all", min=1)] = 100,
    seed: Annotated[int, typer.Option(help="of the search", min=0)] = 0,
    study: Annotated[
        Path | None, typer.Option(metavar="FILE", help="keeps the maps tried; go on where it ends")
    ] = None,
    tokens: Annotated[int, typer.Option(help="tokens of the text to read at most", min=1)] = 1024,
    json: AsJson = False,
) -> None:
    """The pair of key and value bits that each layer of a model should take within a budget, and the front of bits and
    loss: the mean KL divergence of the next token from full precision, on the text and through the packed cache."""
    from .searching import searched, told

    scheme, words = loaded(name), text_of(text)
    with answer.progress(f"searching over {name}") as say, of_a_model():
        found = searched(
            scheme, label(name, scheme), model, words, bits, out, pairs, say, trials=trials, seed=seed, study=study,
            tokens=tokens,
        )  # fmt: skip
    if json:
        answer.document(found)
    else:
        answer.lines(told(found))


@app.command()
def doctor(json: AsJson = False) -> None:
    """Versions, GPU, cache folders, which paths are live and why the others are not."""
    from .doctor import report, told

    found: dict[str, Any] = report()
    if json:
        answer.document(found)
    else:
        answer.lines(told(found))
