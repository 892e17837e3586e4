"""What the commands share: how a name, a model and a shape are asked for, and how input is refused."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from kvdsl.errors import SchemeError, ShapeError

if TYPE_CHECKING:
    from kvdsl.scheme import Scheme


# Typer has its own copy of click or takes the package, by its version: the class is reached through what it exports.
UsageError: type[Any] = typer.BadParameter.__bases__[0]


class Refused(Exception):
    """Input that a command cannot use; the message says what and why."""


class Stage(StrEnum):
    """What `show` can show."""

    scheme = "scheme"
    normal_form = "normal-form"
    layout = "layout"
    plan = "plan"
    source = "source"
    cost = "cost"


class BackendName(StrEnum):
    """What generated text is for."""

    triton = "triton"
    torch = "torch"


class InputFormatName(StrEnum):
    """The dtype of a model's queries, keys and values."""

    fp16 = "fp16"
    bf16 = "bf16"
    fp32 = "fp32"


Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME", help="a name of `kvdsl list`, package.module:NAME, file.py:NAME, a .toml or .json file"
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON document on stdout and nothing else")]
HeadDim = Annotated[int | None, typer.Option(help="channels of a head; default the scheme's own, or 128")]
KvHeads = Annotated[int | None, typer.Option(help="kv heads; default 8, of shared values 1")]
QHeads = Annotated[int | None, typer.Option(help="query heads; default 4 for each kv head, of shared values 32")]
Dtype = Annotated[InputFormatName, typer.Option(help="dtype of queries, keys and values")]
Model = Annotated[str, typer.Option(metavar="DIR", help="a folder in the transformers format, a GGUF file, or smollm2")]


def loaded(name: str) -> Scheme:
    """The scheme of a NAME.  Whatever a user's own file raises is told in one line."""
    from kvdsl.registry import load

    try:
        return load(name)
    except (SchemeError, OSError):
        raise
    except Exception as error:
        raise Refused(f"{name}: {type(error).__name__}: {error}") from None


def refuse(message: str) -> NoReturn:
    """Wrong use of a command, told with where its help is."""
    raise UsageError(message)


def several(command: str, names: Sequence[str] | None, all_: bool) -> dict[str, Scheme]:
    """The schemes that a command was given by name, or all."""
    from kvdsl.registry import names as known

    if all_ == bool(names):
        refuse(f"{command}: name one or more schemes, or give --all")
    return {name: loaded(name) for name in (known() if all_ else names or ())}


def label(name: str, scheme: Scheme) -> str:
    """What generated text is called: the name itself, or the inner name or stem of a path."""
    from kvdsl.registry import name_of, names

    if name in names():
        return name
    shipped = name_of(scheme)
    if not shipped.startswith("scheme-"):
        return shipped
    inner = name.rpartition(":")[2] if ":" in name else Path(name).stem
    return re.sub(r"\W+", "_", inner, flags=re.ASCII)[:40].strip("_") or "scheme"


@contextmanager
def of_a_model() -> Iterator[None]:
    """A model or text that cannot be used is wrong use: kvdsl and transformers both say so by ValueError."""
    try:
        yield
    except (SchemeError, ShapeError):
        raise
    except ValueError as error:
        raise Refused(str(error)) from None


def text_of(path: Path | None) -> str:
    assert path is not None
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise Refused(f"{path}: it is no text in UTF-8; give a text file") from None
