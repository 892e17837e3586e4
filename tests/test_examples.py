"""Every example runs to its end, the demo on its real model too."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NEEDS = {"plug_into_a_model": "transformers", "check_a_scheme": "hypothesis", "compose_a_scheme": "hypothesis"}


def output(path: Path) -> str:
    """What an example prints, in a process of its own."""
    environment = {"PYTHONPATH": str(ROOT), **os.environ}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_are_six_examples_and_the_demo() -> None:
    names = ["check_a_scheme", "compose_a_scheme", "demo", "plug_into_a_model", "read_the_kernel", "route_tokens"]
    names += ["write_a_scheme"]
    assert [path.stem for path in EXAMPLES] == names


@pytest.mark.parametrize("path", [p for p in EXAMPLES if p.stem != "demo"], ids=lambda path: path.stem)
def test_an_example_runs(path: Path) -> None:
    needed = NEEDS.get(path.stem)
    if needed and importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    assert len(output(path).splitlines()) >= 2


def test_the_demo_runs_on_the_real_model() -> None:
    told = output(ROOT / "examples" / "demo.py")
    assert "equal the definition bit for bit" in told and "0 fallbacks" in told
