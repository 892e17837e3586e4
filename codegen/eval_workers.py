"""Schemes of one evaluation shared out among processes, each with a model of its own and rows in one file."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import kvdsl
from kvdsl.evaluation.settings import ROWS

WAIT = 0.5  # seconds between looks at the file


def share(names: Sequence[str], processes: int) -> list[list[str]]:
    """The names dealt out in turn, to no more processes than there are names."""
    return [list(names[i::processes]) for i in range(min(processes, len(names)))]


@contextmanager
def kept(out: Path | None, processes: int) -> Iterator[Path | None]:
    """The folder for rows: a passing one where several processes need one and none is given."""
    if out is not None or processes == 1:
        yield out
        return
    with tempfile.TemporaryDirectory(prefix="kvdsl-eval-") as name:
        yield Path(name)


def repeated(**options: object) -> list[str]:
    """Options of the command as they were given; those that are None or False were not."""
    found = list[str]()
    for name, value in options.items():
        if value is not None and value is not False:
            found += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return found


def measured_by(
    processes: int, names: Sequence[str], options: Sequence[str], folder: Path | None, say: Callable[[str], None]
) -> None:
    """Run `kvdsl eval` for every share of the names until all are done; rows are in the folder's file then.

    What a process could not do is left to the caller, who finds rows missing and says why.  Processors are shared out
    evenly, unless OMP_NUM_THREADS says else.
    """
    assert folder is not None
    folder.mkdir(parents=True, exist_ok=True)
    command = ["-m", "kvdsl", "eval", *options, "--rows-only"]
    run_all([[*command, *some] for some in share(names, processes)], folder, say)


def run_all(commands: Sequence[Sequence[str]], folder: Path, say: Callable[[str], None]) -> None:
    """Run Python with each of these arguments, side by side, until all are done; rows go to the folder's file."""
    threads = max(1, (os.cpu_count() or 1) // max(1, len(commands)))
    paths = [str(Path(kvdsl.__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    nowhere = subprocess.DEVNULL
    running = [
        subprocess.Popen([sys.executable, *command], env=environment, stdout=nowhere, stderr=nowhere)
        for command in commands
    ]
    try:
        while any(one.poll() is None for one in running):
            say(f"{_lines(folder / ROWS)} rows, by {len(running)} processes")
            time.sleep(WAIT)
    finally:
        for one in running:
            one.terminate()
        for one in running:
            one.wait()


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0
