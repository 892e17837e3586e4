"""Every example runs to its end, those of a real model on small settings."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NEEDS = {"plug_into_a_model": "transformers", "design_a_scheme": "hypothesis"}
SAYS = {
    "demo": ("equal the definition bit for bit", "0 fallbacks"),
    "design_a_scheme": ("refused: ", "the same loop", "laws hold"),
    "find_a_scheme": ("front", "within 3 bits: ", "keys = {", "packed  "),
    "read_the_kernel": ("lowered", "a page holds", "for tile in tl.range("),
}
"""What stands in the output of an example."""


def output(name: str, folder: Path, *arguments: str) -> str:
    """What an example prints, in a process of its own; what it leaves is in the folder."""
    environment = {"PYTHONPATH": str(ROOT), **os.environ, "TMPDIR": str(folder)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def lines_of(told: str, *names: str) -> dict[str, list[str]]:
    """Rows of a table that begin with these names, cell by cell."""
    rows = [(name, line) for line in told.splitlines() for name in names if line.startswith(f"{name} ")]
    return {name: line.removeprefix(name).split() for name, line in rows}


def test_there_are_six_examples_and_the_demo() -> None:
    names = ["compare_schemes", "demo", "design_a_scheme", "find_a_scheme", "plug_into_a_model", "read_the_kernel"]
    assert [path.stem for path in EXAMPLES] == [*names, "route_tokens"]


@pytest.mark.parametrize("name", [path.stem for path in EXAMPLES if path.stem != "compare_schemes"])
def test_an_example_runs(name: str, tmp_path: Path) -> None:
    needed = NEEDS.get(name)
    if needed and importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    small = [tiny.saved("llama", tmp_path / "model", max_position_embeddings=4096)] if name == "find_a_scheme" else []
    told = output(name, tmp_path, *small)
    assert len(told.splitlines()) >= 2 and all(said in told for said in SAYS.get(name, ()))
    if name == "design_a_scheme":  # every step pays, and the last one loses less than kivi2, which takes more bits
        steps = lines_of(told, "first", "turned", "and levels", "kivi2", "and sinks")
        losses = {step: float(cells[-1]) for step, cells in steps.items()}
        ordered = [losses[step] for step in ("first", "turned", "and levels", "and sinks")]
        assert ordered == sorted(ordered, reverse=True) and losses["and sinks"] < losses["kivi2"]


def test_schemes_are_compared_on_a_model_in_a_folder(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    told = output("compare_schemes", tmp_path, "smollm2", "--windows", "1", "--out", str(tmp_path))
    rows = lines_of(told, "kivi2", "kivi4", "turboquant3", "quarot4", "zipcache", "full precision")
    assert len(rows) == 6 and float(rows["kivi4"][3]) < float(rows["kivi2"][3])
    assert str(tmp_path / "report.html") in told
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!")
