"""Generated text as files: found again, verified, never half written, never trusted blindly."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
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
    store.say.cache_clear()
    return tmp_path


def test_a_stored_text_is_found_again(home: Path) -> None:
    first = codegen.build(ALL["kivi2"], SHAPE, backend="torch")
    codegen._build.cache_clear()
    second = codegen.build(ALL["kivi2"], SHAPE, backend="torch")
    assert first.path == second.path and first.path.is_relative_to(home)
    assert len(list(first.path.parent.glob("*.py"))) == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[: len(raw) // 2],
        lambda raw: raw[:-1],
        lambda raw: b"",
        lambda raw: bytes(len(raw)),
        lambda raw: b"\xff" * 100,
        lambda raw: raw.replace(b"32256", b"32257", 1),
    ],
    ids=["half", "shorter", "empty", "zeros", "garbage", "one number"],
)
def test_a_damaged_file_is_noticed_and_made_anew(home: Path, damage: Callable[[bytes], bytes]) -> None:
    """Fault 29: a file that was cut or changed is not loaded; one warning, and the text is made again."""
    path = codegen.build(ALL["kivi2"], SHAPE, backend="torch").path
    whole = path.read_bytes()
    assert damage(whole) != whole
    path.write_bytes(damage(whole))
    codegen._build.cache_clear()
    with pytest.warns(RuntimeWarning, match="damaged") as said:
        again = codegen.build(ALL["kivi2"], SHAPE, backend="torch")
    assert again.source.encode() == whole == again.path.read_bytes() and len(said) == 1


def test_text_of_another_compiler_is_not_used(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 27: the key holds the compiler's own source."""
    plan = plan_for(ALL["kivi2"], SHAPE)
    path = store.keep("kivi2", plan, "torch", "old = 1\n")
    assert store.find("kivi2", plan, "torch") == path
    monkeypatch.setattr(store, "compiler_digest", lambda: "another")
    assert store.find("kivi2", plan, "torch") is None


def test_text_of_another_plan_is_not_used(home: Path) -> None:
    """Fault 27: each part of the key counts: scheme, shape, backend."""
    store.keep("own", plan_for(ALL["kivi2"], SHAPE), "torch", "old = 1\n")
    for scheme, shape, backend in (
        ("kivi4", SHAPE, "torch"),
        ("kivi2", Shape(64, 4), "torch"),
        ("kivi2", Shape(64, 2, dtype="bf16"), "torch"),
        ("kivi2", Shape(64, 2, softcap=True), "torch"),
        ("kivi2", SHAPE, "triton"),
    ):
        assert store.find("own", plan_for(ALL[scheme], shape), backend) is None


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
    with pytest.warns(RuntimeWarning, match="cannot be written"), pytest.raises(OSError, match="full"):
        store.keep("kivi2", plan, "torch", "x = 1\n")
    assert not [path for path in home.rglob("*") if path.is_file()]


def test_a_full_disk_is_no_reason_to_stop(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 30: what cannot be written is kept for this process, and that is said once."""
    replace = os.replace

    def full(source: str, target: Path) -> None:
        if Path(target).is_relative_to(home):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(RuntimeWarning, match="for this process only: .*No space left") as said:
        kernels = codegen.build(ALL["kivi2"], SHAPE, backend="torch")
    assert len(said) == 1 and not kernels.path.is_relative_to(home)
    assert not [path for path in home.rglob("*") if path.is_file()]


def test_a_home_that_is_none_is_no_reason_to_stop(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 30: a folder that cannot be made, that cannot be written, that belongs to someone else."""
    (home / "file").write_text("")
    monkeypatch.setenv("KVDSL_CACHE_DIR", str(home / "file"))
    with pytest.warns(RuntimeWarning, match="cannot be made"):
        codegen.build(ALL["kivi2"], SHAPE, backend="torch")
    (home / "code").mkdir(mode=0o700)
    with monkeypatch.context() as other:
        other.setattr(os, "access", lambda *_: False)
        assert "read-only" in str(store.usable(home / "code"))
    with monkeypatch.context() as other:
        other.setattr(os, "getuid", lambda: (home / "code").stat().st_uid + 1)
        assert "belongs to another user" in str(store.usable(home / "code"))
    assert store.usable(home / "code") is None


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
