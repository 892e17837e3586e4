"""Generated functions without assignments that nothing reads.

A kernel is put together from what its parts may need: the waves of clean pages, say, also where programs of the edges
have waves of their own.  Loads and arithmetic have no other effect, so a name that is not read on any way from where it
was assigned takes its lines along.  Loops end at their end: Triton knows no `break`.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence


def without_unused(text: str) -> str:
    """Functions without assignments to names that nothing reads behind them."""
    while unread := _unread(ast.parse(text).body, set())[0]:  # again, for what these lines alone have read
        lines = text.split("\n")
        for one in sorted(unread, key=lambda one: one.lineno, reverse=True):
            del lines[one.lineno - 1 : one.end_lineno]
        text = "\n".join(lines)
    return text


def _unread(block: Sequence[ast.stmt], live: set[str]) -> tuple[list[ast.stmt], set[str]]:
    """Assignments that nothing reads in a block behind which these names are read, and what is read from its beginning
    on.  A block is not left without statements."""
    found, own = list[ast.stmt](), 0
    for one in reversed(block):
        if isinstance(one, ast.Assign) and not _names(*one.targets) & live:
            found.append(one)
            own += 1
        elif isinstance(one, ast.Assign):
            live = live - _names(*one.targets) | _names(one.value)
        elif isinstance(one, ast.FunctionDef):
            found += _unread(one.body, set())[0]
        elif isinstance(one, ast.If):
            (body, before), (other, instead) = _unread(one.body, live), _unread(one.orelse, live)
            found += body + other
            live = before | instead | _names(one.test)
        elif isinstance(one, ast.For | ast.While):
            body, before = _unread(one.body, live | _read(one))
            found += body
            live = live | before | _names(one.iter if isinstance(one, ast.For) else one.test)
        else:
            live = live | _names(one)
    return ([] if own == len(block) else found), live


def _names(*nodes: ast.AST) -> set[str]:
    return {one.id for node in nodes for one in ast.walk(node) if isinstance(one, ast.Name)}


def _read(loop: ast.stmt) -> set[str]:
    """The names that a loop reads."""
    steps = {one.target for one in ast.walk(loop) if isinstance(one, ast.AugAssign)}
    names = (one for one in ast.walk(loop) if isinstance(one, ast.Name))
    return {one.id for one in names if isinstance(one.ctx, ast.Load) or one in steps}
