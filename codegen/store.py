"""Generated text as files: named by scheme and digest, written atomically, verified by digest when loaded.

A module is loaded from a file and never from a string: compiled kernels need their source, and a person can open,
step through and grep a file.  The text holds no state, so one file serves every process.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import stat
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .plan import Plan

_LOCK = Lock()


def folder() -> Path:
    """Where generated files live: $KVDSL_CACHE_DIR, else the user's cache folder."""
    given = os.environ.get("KVDSL_CACHE_DIR")
    if given:
        return Path(given) / "code"
    from platformdirs import user_cache_path

    return user_cache_path("kvdsl") / "code"


def digest(text: str) -> str:
    """Ten hex digits of the text."""
    return hashlib.sha256(text.encode()).hexdigest()[:10]


@cache
def _private() -> Path:
    """A folder only this process uses, where the cache folder cannot be trusted or written."""
    return Path(tempfile.mkdtemp(prefix="kvdsl-"))


def usable(path: Path) -> str | None:
    """Make the folder; why it must not be used, or None."""
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = path.lstat()
    except OSError as error:
        return f"{path} cannot be made: {error.strerror}"
    if stat.S_ISLNK(status.st_mode):
        return f"{path} is a link"
    if hasattr(os, "getuid") and status.st_uid != os.getuid():
        return f"{path} belongs to another user"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others may write into {path}"
    if not os.access(path, os.W_OK):
        return f"{path} is read-only"
    return None


def write(path: Path, text: str) -> None:
    """Write atomically: a reader sees the old file or the whole new one."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _home(name: str) -> Path:
    """The folder of a scheme's files: in the cache folder, or private to this process, which is said once."""
    home = folder() / name
    why = usable(folder()) or usable(home)
    if why is None:
        return home
    say(f"generated code is kept for this process only: {why}")
    home = _private() / name
    home.mkdir(parents=True, exist_ok=True)
    return home


@cache
def say(message: str) -> None:
    """A warning, once."""
    warnings.warn(message, RuntimeWarning, stacklevel=5)


def key(plan: Plan, backend: str) -> str:
    """What a stored text depends on: the scheme, the shape, the backend, the compiler itself."""
    parts = (plan.scheme.hash, repr(plan.shape), backend, compiler_digest())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


@cache
def compiler_digest() -> str:
    """A digest of the compiler's own source, so that no text outlives the code that printed it."""
    here = Path(__file__).parent
    total = hashlib.sha256()
    for path in sorted(here.glob("*.py")):
        total.update(path.read_bytes())
    return total.hexdigest()


def find(name: str, plan: Plan, backend: str) -> Path | None:
    """The stored text of a plan, if it is there and whole."""
    home = _home(name)
    for path in home.glob(f"{name}_{backend}_{key(plan, backend)}_*.py"):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            text = ""
        if path.stem.rsplit("_", 1)[-1] == digest(text):
            return path
        say(f"{path} was damaged and is made anew")
        path.unlink(missing_ok=True)
    return None


def keep(name: str, plan: Plan, backend: str, text: str) -> Path:
    """Store a text under the digest of what it depends on and its own; where the disk is full, for this process."""
    path = _home(name) / f"{name}_{backend}_{key(plan, backend)}_{digest(text)}.py"
    try:
        write(path, text)
    except OSError as error:
        say(f"generated code is kept for this process only: {path.parent} cannot be written ({error})")
        path = _private() / name / path.name
        path.parent.mkdir(exist_ok=True)
        write(path, text)
    return path


def load(path: Path) -> ModuleType:
    """Import a generated file; the same file gives the same module."""
    name = f"kvdsl_generated.{path.stem}"
    with _LOCK:
        known = sys.modules.get(name)
        if known is not None and known.__file__ == str(path):
            return known
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
        return module
