"""Generated text as files: found again, verified, never half written, never trusted blindly."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from kvdsl import codegen
from kvdsl.codegen import store
from kvdsl.codegen.plan import plan_for
from kvdsl.schemes import ALL
from kvdsl.shape import Shape

SHAPE = Shape(64, 2)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVDSL_CACHE_DIR", str(tmp_path))
    codegen._build.cache_clear()
    store._say.cache_clear()
    return tmp_path


def test_a_stored_text_is_found_again(home: Path) -> None:
    first = codegen.build(ALL["kivi2"], SHAPE, backend="torch")
    codegen._build.cache_clear()
    second = codegen.build(ALL["kivi2"], SHAPE, backend="torch")
    assert first.path == second.path and first.path.is_relative_to(home)
    assert len(list(first.path.parent.glob("*.py"))) == 1


def test_a_damaged_file_is_noticed_and_made_anew(home: Path) -> None:
    """Fault 29: a cut file is not loaded."""
    path = codegen.build(ALL["kivi2"], SHAPE, backend="torch").path
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    codegen._build.cache_clear()
    with pytest.warns(RuntimeWarning, match="damaged"):
        again = codegen.build(ALL["kivi2"], SHAPE, backend="torch")
    assert again.source == whole


def test_text_of_another_compiler_is_not_used(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 27: the key holds the compiler's own source."""
    plan = plan_for(ALL["kivi2"], SHAPE)
    store.keep("kivi2", plan, "torch", "old = 1\n")
    monkeypatch.setattr(store, "compiler_digest", lambda: "another")
    assert store.find("kivi2", plan, "torch") is None


def test_a_folder_that_others_may_write_is_not_trusted(home: Path) -> None:
    """Fault 30: code is kept in memory of this process instead, and that is said."""
    (home / "code").mkdir()
    os.chmod(home / "code", 0o777)
    with pytest.warns(RuntimeWarning, match="others may write"):
        kernels = codegen.build(ALL["kivi2"], SHAPE, backend="torch")
    assert not kernels.path.is_relative_to(home)


def test_a_planted_link_is_not_followed(home: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    (home / "code").symlink_to(tmp_path_factory.mktemp("elsewhere"))
    with pytest.warns(RuntimeWarning, match="is a link"):
        codegen.build(ALL["kivi2"], SHAPE, backend="torch")


def test_a_failed_write_leaves_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_for(ALL["kivi2"], SHAPE)

    def full(*_: object) -> None:
        raise OSError("full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="full"):
        store.keep("kivi2", plan, "torch", "x = 1\n")
    assert not [path for path in home.rglob("*") if path.is_file()]


def test_processes_that_build_at_once_agree(home: Path) -> None:
    """Fault 28: several processes, one file."""
    program = "from kvdsl import build, load, Shape\nprint(build(load('kivi2'), Shape(64, 2), backend='torch').path)\n"
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", program]
    children = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    paths = {child.communicate()[0].strip() for child in children}
    assert len(paths) == 1 and Path(paths.pop()).exists()


def test_stored_text_needs_no_algebra(home: Path) -> None:
    """A build from the store derives nothing: sympy is not even imported."""
    codegen.build(ALL["kivi2"], SHAPE, backend="torch")
    program = (
        "import sys\nfrom kvdsl import build, load, Shape\n"
        "build(load('kivi2'), Shape(64, 2), backend='torch')\nprint('sympy' in sys.modules)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    out = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    # torch itself may import sympy; what must not happen is an import by the compiler
    bare = subprocess.run([sys.executable, "-c", "import sys, torch; print('sympy' in sys.modules)"],
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert out.stdout == bare.stdout


def test_no_warning_where_nothing_is_wrong(home: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        codegen.build(ALL["token4"], SHAPE, backend="torch")
