"""Lines that nothing reads go away, and what a function does stays."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from kvdsl.codegen.unused import without_unused

NAMES = "abcd"
VALUES = st.sampled_from([*NAMES, "1", "i"])
SUMS = st.builds("{} + 2 * {}".format, VALUES, VALUES)
SINGLE = st.builds("{} = {}".format, st.sampled_from(NAMES), SUMS)
DOUBLE = st.builds("{} = {}, (\n{}\n)".format, st.sampled_from(["a, b", "c, d", "b, c"]), SUMS, SUMS)
TOLD = st.builds("told.append({})".format, VALUES)
HEADS = st.builds("if {} % 2:".format, VALUES) | st.just("for i in range(3):")


def indented(lines: list[str]) -> list[str]:
    return ["    " + line for text in lines for line in text.split("\n")]


def blocks(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """A branch, with another or without, or a loop, around statements."""
    body = st.lists(inner, min_size=1, max_size=4).map(indented)
    both = st.builds(lambda value, x, y: "\n".join([f"if {value} % 2:", *x, "else:", *y]), VALUES, body, body)
    return both | st.builds(lambda head, x: "\n".join([head, *x]), HEADS, body)


STATEMENTS = st.recursive(SINGLE | DOUBLE | TOLD, blocks, max_leaves=12)
FUNCTIONS = st.lists(STATEMENTS, min_size=1, max_size=8).map(
    lambda found: "\n".join(["def f(told, i, a, b, c, d):", *indented(found), "    return a + b"])
)


def done(text: str) -> tuple[Any, list[int]]:
    """What a function gives, and what it tells on its way."""
    space: dict[str, Any] = {}
    exec(text, space)
    told: list[int] = []
    return space["f"](told, 1, 2, 3, 4, 5), told


@given(FUNCTIONS)
def test_a_function_does_what_it_did(text: str) -> None:
    shorter = without_unused(text)
    assert done(shorter) == done(text)
    assert without_unused(shorter) == shorter
    assert set(shorter.split("\n")) <= set(text.split("\n"))


def test_what_only_the_other_branch_reads_goes() -> None:
    text = """
def f(x):
    near = x + 1  # for the edges
    far = near + x
    if x:
        near = (
            x
        )
        far = near
        store(x)
    else:
        store(near)
"""
    left = """
def f(x):
    near = x + 1  # for the edges
    if x:
        store(x)
    else:
        store(near)
"""
    assert without_unused(text) == left


def test_what_the_next_turn_reads_stays() -> None:
    text = """
def f(x):
    page = x
    for tile in range(4):
        token = 0
        store(page)
        token = tile
        page = token
"""
    assert without_unused(text) == text.replace("        token = 0\n", "")
