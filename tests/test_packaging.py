"""The wheel: it holds one package, with the folders that a checkout reaches through links."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools")
ROOT = Path(__file__).resolve().parent.parent
PARTS = ("kvdsl", "codegen", "schemes", "pyproject.toml", "README.md")


def copied(folder: Path, *, symlinks: bool) -> Path:
    """What a build reads, with its links or, as a machine without links would have it, without them."""
    skip = shutil.ignore_patterns("__pycache__")
    for name in PARTS:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, folder / name, symlinks=True, ignore=skip)
        else:
            shutil.copy(path, folder / name)
    if not symlinks:
        for name in ("codegen", "schemes"):
            (folder / "kvdsl" / name).unlink()
    return folder


def module_path(path: Path) -> str:
    """Where a source file stands in the wheel."""
    own = path.relative_to(ROOT)
    return (own if own.parts[0] == "kvdsl" else Path("kvdsl") / own).as_posix()


def wheel_of(folder: Path) -> zipfile.ZipFile:
    options = ["--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", str(folder / "dist")]
    command = [sys.executable, "-m", "pip", "wheel", *options, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(next((folder / "dist").glob("kvdsl-*.whl")))


@pytest.mark.parametrize("symlinks", [True, False], ids=["links", "no_links"])
def test_the_wheel_holds_all_of_kvdsl_and_nothing_else(symlinks: bool, tmp_path: Path) -> None:
    with wheel_of(copied(tmp_path, symlinks=symlinks)) as wheel:
        names = set(wheel.namelist())
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"kvdsl"}
    sources = {
        module_path(path)
        for name in ("kvdsl", "codegen", "schemes")
        for path in (ROOT / name).rglob("*.py")
        if "__pycache__" not in path.parts
    }
    assert {name for name in names if name.endswith(".py")} == sources
    assert {"kvdsl/py.typed", "kvdsl/codegen/report.html"} <= names


def test_what_is_asked_for_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {
        line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    }
    extras = project["optional-dependencies"]
    extras.pop("vllm")  # it pins its own torch, and stands in an environment of its own
    asked = [*project["dependencies"], *(one for extra in extras.values() for one in extra)]
    assert {one.split(">=")[0].lower() for one in asked} <= pinned


def test_no_file_of_the_set_up_names_a_registry() -> None:
    for name in ("pyproject.toml", "constraints.txt", "Makefile", ".ci/run"):
        text = (ROOT / name).read_text()
        assert "://" not in text and "index-url" not in text, name
