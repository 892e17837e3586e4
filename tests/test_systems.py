"""The pages that are made of shipped schemes: what the compiler says, of plain ones and of tiers."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from kvdsl.codegen import render
from kvdsl.codegen.listing import rows
from kvdsl.codegen.plan import plan_for
from kvdsl.schemes import ALL
from kvdsl.shape import usual

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def systems() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "benchmarks" / "systems.py"))


@pytest.mark.parametrize("name", ["kivi2", "polar", "kvtuner", "zipcache", "streaming"])
def test_a_page_says_what_the_compiler_says(name: str, systems: dict[str, Any]) -> None:
    row = next(one for one in rows() if one["name"] == name)
    page = systems["page"](name, ALL[name], row)
    assert page.startswith(f"# {name}\n") and row["source"] in page and ALL[name].hash in page
    assert re.findall(r"^## (.*)$", page, re.MULTILINE) == [
        "Method", "Measured quality", "Spec", "Bits", "Algebra", "Kernel",
    ]  # fmt: skip
    marks = re.findall(r"^```(.*)$", page, re.MULTILINE)
    assert len(marks) % 2 == 0 and not any(marks[1::2]) and all(marks[::2])
    assert f"mean {row['bits']['mean']:.3f}" in page
    if name == "kivi2":
        loop = page.partition("```python\n")[2].partition("\n```")[0].split("\n")[:20]
        generated = render(plan_for(ALL[name], usual(ALL[name])), "triton", name)
        assert "\n".join(f"        {line}" for line in loop) in generated


def test_pages_are_written_with_one_that_leads_to_them(
    systems: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["systems.py", "kivi4", "--out", str(tmp_path)])
    systems["main"]()
    assert capsys.readouterr().out == f"pages of 1 schemes: {tmp_path}\n"
    assert {path.name for path in tmp_path.iterdir()} == {"kivi4.md", "index.md"}
    assert "| [kivi4](kivi4.md) | KIVI | 5.000 | 5.000 | 5.000 |" in (tmp_path / "index.md").read_text()
    monkeypatch.setattr(sys, "argv", ["systems.py", "nonsense"])
    with pytest.raises(SystemExit):
        systems["main"]()
