"""Generated functions without assignments that nothing reads.

A kernel is put together from what its parts may need: the waves of clean pages, say, also where programs of the edges
have waves of their own.  Loads and arithmetic have no other effect, so a name that is not read on any way from where it
was assigned takes its line along.  Loops end at their end: Triton knows no `break`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

NAME = re.compile(r"\w+")
ASSIGNED = re.compile(r"(\w+(?:, \w+)*) = (.*)", re.DOTALL)
LOOPS, OTHERWISE = ("for", "while"), ("elif", "else")


@dataclass(frozen=True)
class Statement:
    """One statement: its lines, those of its head where a block follows."""

    depth: int
    lines: list[str]
    block: list[Statement] = field(default_factory=list)

    @property
    def code(self) -> str:
        """Its lines without comments."""
        return "\n".join(line.partition("#")[0] for line in self.lines).strip()

    @property
    def assigned(self) -> set[str]:
        """The names that it does nothing but assign."""
        found = ASSIGNED.fullmatch(self.code)
        return set(NAME.findall(found[1])) if found else set()

    def read(self) -> set[str]:
        """The names that it reads, and that statements of its block do."""
        found = ASSIGNED.fullmatch(self.code)
        return set(NAME.findall(found[2] if found else self.code)).union(*(one.read() for one in self.block))

    def text(self) -> Iterator[str]:
        yield from self.lines
        for one in self.block:
            yield from one.text()


def without_unused(text: str) -> str:
    """Functions without assignments to names that nothing reads behind them."""
    statements = _parsed(text)
    while (kept := _kept(statements, set())[0]) != statements:  # what was read by a loop's lines alone
        statements = kept
    return "\n".join(line for one in statements for line in one.text())


def _parsed(text: str) -> list[Statement]:
    """Statements by their indentation; each goes on until its brackets are closed."""
    path, blank, open_ = [Statement(-1, [])], 0, 0
    for line in text.split("\n"):
        if open_:
            path[-1].lines.append(line)
        elif not line:
            blank += 1
            continue
        else:
            depth = len(line) - len(line.lstrip())
            while path[-1].depth >= depth:
                path.pop()
            one = Statement(depth, [line])
            path[-1].block.extend([*(Statement(depth, [""]) for _ in range(blank)), one])
            path, blank = [*path, one], 0
        code = line.partition("#")[0]
        open_ += sum(map(code.count, "([{")) - sum(map(code.count, ")]}"))
    path[0].block.extend(Statement(0, [""]) for _ in range(blank))
    return path[0].block


def _kept(block: Iterable[Statement], live: set[str]) -> tuple[list[Statement], set[str]]:
    """What is left of a block behind which these names are read, and the names that are read from its beginning on."""
    kept: list[Statement] = []
    behind: set[str] | None = None  # the branches of an `if` that were met: the names read behind all of them
    for one in reversed(list(block)):
        word = one.code.partition(" ")[0].rstrip(":")
        if one.block:
            end = live if behind is None else behind
            end = set() if word == "def" else end | one.read() if word in LOOPS else end
            inside, before = _kept(one.block, end)
            one = replace(one, block=inside or one.block)
            behind = (live if behind is None else behind) if word in OTHERWISE else None
            live = live | before | set(NAME.findall(one.code))
        elif one.assigned and not one.assigned & live:
            continue
        else:
            live = live - one.assigned | one.read()
        kept.append(one)
    return kept[::-1], live
