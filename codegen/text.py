"""Building source line by line, and the names that generated modules use."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from string import Template

WIDTH = 120  # of a line of generated text
DEVICE = ("device", "device_codes", "device_ends", "device_masked", "device_steps", "device_turn", "device_launch")
"""The modules of this package whose functions generated kernels call."""


class Lines:
    """Source under construction: `add` lines at the current depth, `deeper` indents."""

    def __init__(self, depth: int = 0) -> None:
        self.depth = depth
        self.lines: list[str] = []

    def add(self, *lines: str) -> None:
        for line in lines:
            self.lines.append("    " * self.depth + line if line else "")

    def extend(self, lines: Iterable[str]) -> None:
        self.add(*lines)

    @contextmanager
    def deeper(self, head: str) -> Iterator[None]:
        self.add(head)
        self.depth += 1
        yield
        self.depth -= 1

    def __str__(self) -> str:
        return "\n".join(self.lines) + "\n"


def fill(skeleton: str, **holes: Iterable[str] | str | int) -> str:
    """Fill a skeleton: a hole `$name` alone on its line takes lines, indented as it stands (none: the line goes away);
    a hole inside a line takes a word."""
    words = {name: value for name, value in holes.items() if isinstance(value, (str, int))}
    blocks = {name: list(value) for name, value in holes.items() if not isinstance(value, (str, int))}
    out: list[str] = []
    for line in skeleton.strip("\n").split("\n"):
        name = line.strip()[1:]
        if line.strip().startswith("$") and name in blocks:
            margin = line[: len(line) - len(line.lstrip())]
            out += [margin + text if text else "" for text in blocks[name]]
        else:
            out.append(Template(line).substitute(words))
    return "\n".join(out) + "\n"


def padded(count: int) -> int:
    """The next power of two: what a tile's side must be."""
    return 1 << (count - 1).bit_length()


def plus(value: int) -> str:
    """An addend; nothing for 0."""
    return f" {'-' if value < 0 else '+'} {abs(value)}" if value else ""


def literal(value: float) -> str:
    """A float literal."""
    return repr(float(value))


@cache
def helpers(module: str) -> tuple[str, ...]:
    """The functions that a module of this package defines, under all their names, read from its text: it must not be
    imported to print."""
    tree = ast.parse((Path(__file__).parent / f"{module}.py").read_text(encoding="utf-8"))
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    others = (node for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.value) in names)
    return tuple(sorted(names | {ast.unparse(target) for node in others for target in node.targets}))


def helpers_used(modules: Iterable[str], body: str) -> str:
    """The import statements of the functions of these modules that a text calls."""
    statements, called = "", set(re.findall(r"(?<![\w.])(\w+)\(", body))
    for module in modules:
        used = [name for name in helpers(module) if name in called]
        statements += imported(f"kvdsl.codegen.{module}", used) if used else ""
    return statements


def imported(module: str, names: Iterable[str]) -> str:
    """An import statement, on one line where it fits."""
    names = sorted(names)
    line = f"from {module} import {', '.join(names)}\n"
    if len(line) <= WIDTH:
        return line
    return f"from {module} import (\n" + "".join(f"    {name},\n" for name in names) + ")\n"


def listed(items: Iterable[str]) -> str:
    """A tuple's items: a comma after a single one."""
    items = list(items)
    return f"{items[0]}," if len(items) == 1 else ", ".join(items)


def bare(text: str) -> str:
    """An expression without the parentheses around all of it."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0 and i < len(text) - 1:
            return text
    return text[1:-1] if text.startswith("(") else text
