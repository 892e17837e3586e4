"""Blocks of code in pages of Markdown, and what it means that one holds.

```python    is run, in one namespace a page, from the first block to the last
```text      is what the Python blocks before it printed
```console   is commands behind `$ `, each with what it prints; they are run in a folder of the page's own
```toml      is a file of that folder, and so is a Python block, where its first line is a comment with the name

A line `...` of an output stands for any lines, `...` within a line for any words.  The line before a block may be a
comment: `<!-- excerpt: COMMAND -->` before lines that stand in what the command prints, `<!-- not run: WHY -->` before
a block that is only shown.  What Python of such a block takes from here must be there, and commands must know their
options.
"""

from __future__ import annotations

import ast
import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from sybil import Document, Example
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser
from sybil.typing import Evaluator
from typer.core import TyperGroup
from typer.main import get_command

import kvdsl
from kvdsl.codegen.cli import app, run

ROOT = Path(__file__).resolve().parent.parent
LANGUAGES = ("python", "text", "console", "toml")
REASONS = ("needs a GPU", "takes minutes")
"""Why a block may be shown and not be run."""
_FENCE = re.compile(r"^ *```(.*)$", re.MULTILINE)
_MARK = re.compile(r"<!-- (not run|excerpt): (.+) -->\n\Z")
_FILE = re.compile(r"# (\w+\.(?:py|toml))\n")
_python = PythonEvaluator()


def parsed(path: Path) -> Document:
    """A page with its blocks, each with what it means."""
    evaluators: dict[str, Evaluator] = {"python": _run, "text": _compare, "console": _command, "toml": _keep}
    return Document.parse(str(path), *(CodeBlockParser(language, evaluators[language]) for language in LANGUAGES))


def languages(text: str) -> list[str]:
    """What every fence that opens a block says."""
    return _FENCE.findall(text)[::2]


def unrun(document: Document) -> Iterator[str]:
    """Why blocks are shown that are not run."""
    marks = (_mark(example) for example in document.examples())
    return (why for kind, why in marks if kind == "not run")


def _mark(example: Example) -> tuple[str, str]:
    found = _MARK.search(example.document.text[: example.start])
    return (found[1], found[2]) if found else ("", "")


def _run(example: Example) -> str | None:
    kind, said = _mark(example)
    if kind == "excerpt":
        return _inside(str(example.parsed), said)
    if kind == "not run":
        _read(str(example.parsed))
        return None
    _keep(example)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        _python(example)
    example.namespace["__printed__"] = example.namespace.get("__printed__", "") + printed.getvalue()
    return None


def _read(source: str) -> None:
    """Raise where lines do not parse, or take a name from kvdsl that it does not have; nothing is run."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            home = import_module(node.module or "")
            assert all(hasattr(home, one.name) for one in node.names), ast.unparse(node)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "kvdsl":
            getattr(kvdsl, node.attr)


def _compare(example: Example) -> str | None:
    kind, said = _mark(example)
    if kind == "excerpt":
        return _inside(str(example.parsed), said)
    return None if kind else _differ(str(example.parsed), example.namespace.pop("__printed__", ""))


def _command(example: Example) -> str | None:
    """Commands of this package alone, in this process."""
    parts = re.split(r"^\$ ", str(example.parsed), flags=re.MULTILINE)
    if parts[0].strip():
        return f"the block begins with no command:\n{parts[0]}"
    for part in parts[1:]:
        line, _, shown = re.sub(r" \\\n +", " ", part).partition("\n")
        if _mark(example)[0] == "not run":
            _look_up(line)
        elif wrong := _differ(shown, printed(line)):
            return f"$ {line}\n{wrong}"
    return None


def _look_up(line: str) -> None:
    """Raise where a command, or one of its options, is not there; nothing is run."""
    name, *arguments = shlex.split(line, comments=True)
    if name == "kvdsl":
        group = get_command(app)
        assert isinstance(group, TyperGroup)
        group.commands[arguments[0]].make_context(arguments[0], arguments[1:])
    elif name == "make" and f"\n{arguments[0]}:" not in (ROOT / "Makefile").read_text(encoding="utf-8"):
        raise ValueError(f"the Makefile has no {arguments[0]}")


def _keep(example: Example) -> None:
    """The block as a file of the folder that it is run in, where its first line names one."""
    if name := _FILE.match(str(example.parsed)):
        Path(name[1]).write_text(str(example.parsed), encoding="utf-8")
    elif example.region.lexemes["arguments"] != "python":
        raise ValueError("the first line is no comment that names a file, as `# grid.toml`")


def printed(line: str) -> str:
    """All that a command prints; one that fails raises."""
    name, *arguments = shlex.split(line, comments=True)
    if name != "kvdsl":
        raise ValueError(f"{name} is none of the commands that are run here; mark the block: {line}")
    with contextlib.redirect_stdout(io.StringIO()) as told, contextlib.redirect_stderr(told):
        status = run(arguments)
    if status:
        raise ValueError(f"exit status {status} of {line}\n{told.getvalue()}")
    return told.getvalue()


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip("\n").split("\n")]


def _differ(shown: str, real: str) -> str | None:
    """What is wrong with an output as a page shows it; nothing shown claims nothing."""
    if not shown.strip():
        return None
    pattern = "\n".join(_pattern(line) for line in _lines(shown))
    held = re.fullmatch(pattern, "\n".join(_lines(real)), re.DOTALL)
    return None if held else f"shown:\n{shown}\nprinted:\n{real}"


def _pattern(line: str) -> str:
    return ".*" if line == "..." else r"[^\n]*".join(map(re.escape, line.split("...")))


def _inside(shown: str, line: str) -> str | None:
    """What is wrong with lines that are said to stand, one behind the other, in what a command prints; how far all of
    them are from the margin is no matter."""

    def level(lines: list[str]) -> list[str]:
        margin = min(len(one) - len(one.lstrip()) for one in lines if one)
        return [one[margin:] for one in lines]

    real, part = _lines(printed(line)), _lines(shown)
    windows = (real[start : start + len(part)] for start in range(len(real) - len(part) + 1))
    held = any(level(window) == level(part) for window in windows if any(window))
    return None if held else f"these lines are not in what `{line}` prints:\n{shown}"
