"""How the pages of a sequence are shared among programs: what generated text does in which order."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from kvdsl.codegen import render
from kvdsl.codegen.aot import compile_many
from kvdsl.codegen.launches import launches
from kvdsl.codegen.plan import plan_for
from kvdsl.schemes import ALL
from kvdsl.shape import Shape

pytest.importorskip("triton")
SHAPE = Shape(128, 8, 32)


@pytest.mark.parametrize("name", ["token4", "token3", "kvtq", "kivi2", "quarot4", "exl3_3"])
def test_the_page_is_asked_for_behind_the_query_and_before_it_is_prepared(name: str) -> None:
    """Else a program would wait for memory twice, or prepare the query while nothing is on its way; behind the branch,
    which the assembler moves nothing across."""
    text = render(plan_for(ALL[name], SHAPE), "triton", name)
    decode = text[text.index("\ndef decode(") : text.index("\ndef extend(")]
    asked = decode.index("    if EARLY:")
    ended = decode.index("            return\n", asked)
    assert "fetch(" in decode[asked:ended]
    assert "tl.load(query" in decode[:asked] and "tl.dot(" not in decode[:ended]
    assert "above(top)" in decode[ended : decode.index("if split < splits:")]
    assert re.search(r"= tl.load\(query", decode[ended : decode.index("if split < splits:")]) is None


def test_programs_of_two_warps_keep_their_numbers_in_registers(tmp_path: Path) -> None:
    """Decode as short sequences have it, which asks for the page early."""
    plan = plan_for(ALL["token4"], SHAPE)
    text = render(plan, "triton", "token4")
    (tmp_path / "token4.py").write_text(text)
    (decode,) = (one for one in launches(plan, text) if one.kernel == "decode")
    twice = replace(decode, warps=2 * decode.warps, constants=(("EARLY", True),))
    ((found,),) = compile_many([(tmp_path / "token4.py", [twice])], cache_folder=tmp_path / "cache")
    assert not found.spilled and found.instructions > 0
