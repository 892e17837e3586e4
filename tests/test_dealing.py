"""Attention's programs take pages in turn, and ask for all that they need before they wait for any of it."""

from __future__ import annotations

import re

import pytest

from kvdsl.codegen import render
from kvdsl.codegen.plan import plan_for
from kvdsl.schemes import ALL
from kvdsl.shape import Shape

SHAPE = Shape(128, 8, 32)


def decode_of(name: str, *, placed: bool = False) -> str:
    """The text of a scheme's decode kernel."""
    plan = plan_for(ALL[name], Shape(128, 8, 32, placed=placed))
    return render(plan, "triton", name).split("def decode(")[1].split("\n@triton.jit")[0]


@pytest.mark.parametrize("name", ["token4", "kivi2", "quarot4", "fp16", "int8_tensor"])
def test_page_and_query_do_not_wait_for_the_length(name: str) -> None:
    text = decode_of(name)
    waits = text.index("asked = length + ahead")  # the first use of what is loaded
    assert "length" not in text[text.index("table = ") : waits].replace("the length", "")
    assert text.index("early_page = tl.load(") < waits
    assert text.index("x0 = tl.load(") < waits < text.index("if split < splits:")


def test_places_know_their_first_page_at_once() -> None:
    text = decode_of("token4", placed=True)
    assert "next_page = early_page" in text and "mask=(low > 0)" not in text


@pytest.mark.parametrize("name", ["token4", "kivi2"])
def test_pages_are_dealt_out_in_turn(name: str) -> None:
    """The stride of a program's pages is the number of programs, and no number is asked for behind the last page."""
    text = decode_of(name)
    loop = re.search(r"for (?:tile|step) in tl.range\((.*), num_stages=STAGES\)", text)
    assert loop is not None and "begin = low + split" in text
    assert "tl.load(table + tl.minimum(tile + splits, high))" in text and loop[1] == "begin, high, splits"
