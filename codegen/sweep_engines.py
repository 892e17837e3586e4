"""Where the members of a sweep are measured: in this process, in several of this machine, or by Ray on many machines.

Whoever measures, rows end in one file of the folder, as they come; what no one could do is left to the caller.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from kvdsl.evaluation.settings import ROWS
from kvdsl.extras import need

from .eval_workers import run_all
from .sweep_worker import measure

Engine = Literal["local", "ray"]
JOB = "job.json"
SHARE = 4  # schemes of a task of Ray: they share the full-precision run of a prompt
Say = Callable[[str], None]


def refuse_engine(engine: str, workers: int, model: object) -> None:
    """ValueError for an engine that is none, and for a model in memory, which no other process has."""
    if engine not in get_args(Engine):
        raise ValueError(f"engine: {engine!r} is none of {', '.join(get_args(Engine))}; give one of these")
    if type(workers) is not int or workers < 1:
        raise ValueError(f"workers: {workers!r} is no whole number of 1 or more; give one")
    if isinstance(model, tuple) and (workers > 1 or engine == "ray"):
        raise ValueError("model: a loaded one cannot be handed to other processes; give its name or folder")
    if engine == "ray":
        need("ray", "ray")


def measured_by(engine: str, workers: int, told: Mapping[str, Any], folder: Path, say: Say) -> None:
    """Rows of a job's schemes into the folder.  One local process is none: the caller measures."""
    if not told["schemes"] or (engine == "local" and workers == 1):
        return
    folder.mkdir(parents=True, exist_ok=True)
    if engine == "ray":
        _by_ray(told, folder, say)
        return
    path, count = folder / JOB, min(workers, len(told["schemes"]))
    path.write_text(json.dumps(told), encoding="utf-8")
    module = ["-m", "kvdsl.codegen.sweep_worker", str(path)]
    run_all([[*module, str(i), str(count)] for i in range(count)], folder, say)


def _by_ray(told: Mapping[str, Any], folder: Path, say: Say) -> None:
    """Tasks of a few schemes on the cluster that RAY_ADDRESS names, or on one of this machine; rows of a task are in
    the file when it ends.  A task that fails, or whose machine is lost, is left to the caller.

    Every machine has kvdsl, and finds the model under the same name.
    """
    ray = need("ray", "ray")
    mine = not ray.is_initialized()
    if mine:
        path = os.pathsep.join([str(_home()), *filter(None, [os.environ.get("PYTHONPATH")])])
        around: dict[str, Any] = {} if "RAY_ADDRESS" in os.environ else {"env_vars": {"PYTHONPATH": path}}
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR", runtime_env=around)
    try:
        rows, task = folder / ROWS, ray.remote(num_gpus=_gpus(told))(rows_of)
        before = rows.read_text(encoding="utf-8", errors="replace") if rows.is_file() else ""
        known = ray.put(before)
        names = [*told["schemes"]]
        shares = [names[i : i + SHARE] for i in range(0, len(names), SHARE)]
        waiting = [task.remote({**told, "schemes": {n: told["schemes"][n] for n in some}}, known) for some in shares]
        while waiting:
            say(f"{len(shares) - len(waiting)} of {len(shares)} tasks of Ray")
            (done, *_), waiting = ray.wait(waiting)
            try:
                text = ray.get(done)
            except ray.exceptions.RayError:
                continue
            with rows.open("a", encoding="utf-8") as file:
                file.write(text)
    finally:
        if mine:
            ray.shutdown()


def rows_of(told: Mapping[str, Any], known: str) -> str:
    """A task: the lines of rows of its schemes that are not among the known ones."""
    with tempfile.TemporaryDirectory(prefix="kvdsl-sweep-") as name:
        rows = Path(name) / ROWS
        rows.write_text(known if known.endswith("\n") or not known else known + "\n", encoding="utf-8")
        size = rows.stat().st_size
        measure(told, Path(name))
        with rows.open("rb") as file:
            file.seek(size)
            return file.read().decode()


def _gpus(told: Mapping[str, Any]) -> int:
    """A task takes a whole GPU where the cluster is asked for some, by `device`."""
    return 1 if str(told.get("device") or "").startswith("cuda") else 0


def _home() -> Path:
    import kvdsl

    return Path(kvdsl.__file__).parent.parent
