"""Kernels that were compiled before and kept all of their numbers in registers: tests/compiled.json.

What becomes of a kernel follows from its text, the functions that it calls, how it is launched and Triton's version.
What was compiled once need not be compiled by every run, then: all of it would take a third of the tests' time.  A
kernel whose digest is not in the file is compiled, however long that takes, and a warning says so.
`python tests/compiled.py` compiles all of them anew and writes the file.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path

from kvdsl.codegen import text as texts
from kvdsl.codegen.aot import compile_many, line
from kvdsl.codegen.launch import Launch

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "tests" / "compiled.json"
BINARIES = ROOT / "build" / "aot"
NEW = ROOT / "build" / "compiled"  # what a run that renews the file has found, a file for each call
RENEW = "KVDSL_COMPILE_ALL"
TESTS = ("tests/test_shipped_kernels.py", "tests/test_forms.py")
Files = Sequence[tuple[Path, Sequence[Launch]]]


def spilled(files: Files, arches: Sequence[str], *, always: bool = False, room: int | None = None) -> list[str]:
    """A line for each kernel of these generated files that moves numbers to memory, or whose programs take more than
    `room` bytes of shared memory; those that are known not to are compiled `always`, or never."""
    every = always or RENEW in os.environ
    digests = {
        (path, one, arch): digest(path, one, arch, room)
        for path, launches in files
        for one in launches
        for arch in arches
    }
    left = {key[:2] for key, found in digests.items() if every or known().get(name(*key)) != found}
    wanted = [(path, [one for one in launches if (path, one) in left]) for path, launches in files]
    wanted = [(path, launches) for path, launches in wanted if launches]
    if not wanted:
        return []
    if not every:
        told = ", ".join(sorted({path.stem for path, _ in wanted}))
        warnings.warn(f"compiled, as they are not in tests/{FILE.name}: kernels of {told}", stacklevel=2)
    compiled = compile_many(wanted, arches, cache_folder=BINARIES)
    kernels = [(path, one) for (path, _), found in zip(wanted, compiled, strict=True) for one in found]
    faults = [(path, one) for path, one in kernels if one.spilled or room is not None and one.shared_bytes > room]
    if RENEW in os.environ and not faults:
        _keep({name(*key): found for key, found in digests.items()})
    return [f"{path.stem}: {line(one)}" for path, one in faults]


@cache
def known() -> Mapping[str, str]:
    """File, kernel and architecture -> digest of what was compiled."""
    found: Mapping[str, str] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


def name(path: Path, launch: Launch, arch: str) -> str:
    return f"{path.stem} {launch.kernel} {arch}"


def digest(path: Path, launch: Launch, arch: str, room: int | None = None) -> str:
    """Of all that decides what becomes of a kernel, and of the room that it may take."""
    given = json.dumps(launch.to_json(), sort_keys=True) + (f" in {room} bytes" if room is not None else "")
    whole = "\n".join([version("triton"), arch, given, _library(), *_called(path, launch.kernel)])
    return hashlib.sha256(whole.encode()).hexdigest()[:20]


def _called(path: Path, kernel: str) -> Iterator[str]:
    """The text of a kernel and of all functions of the file that it calls."""
    functions, wanted, seen = _functions(path), [kernel], {kernel}
    while wanted:
        text = functions[wanted.pop()]
        yield text
        new = {one for one in functions if f"{one}(" in text} - seen
        seen |= new
        wanted += sorted(new)


@cache
def _functions(path: Path) -> Mapping[str, str]:
    source = path.read_text(encoding="utf-8")
    nodes = (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))
    return {node.name: ast.get_source_segment(source, node) or "" for node in nodes}


@cache
def _library() -> str:
    """What generated kernels import."""
    folder = Path(texts.__file__).parent
    return "\n".join((folder / f"{module}.py").read_text(encoding="utf-8") for module in texts.DEVICE)


def _keep(found: Mapping[str, str]) -> None:
    NEW.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found)
    (NEW / f"{hashlib.sha256(text.encode()).hexdigest()[:20]}.json").write_text(text, encoding="utf-8")


def main() -> int:
    for old in NEW.glob("*.json"):
        old.unlink()
    tests = [sys.executable, "-m", "pytest", *TESTS, "-k", "compile"]
    if code := subprocess.run(tests, cwd=ROOT, env={**os.environ, RENEW: "1"}).returncode:
        return code
    found = {key: one for part in NEW.glob("*.json") for key, one in json.loads(part.read_text()).items()}
    FILE.write_text(json.dumps(dict(sorted(found.items())), indent=0) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
