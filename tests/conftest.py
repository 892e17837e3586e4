"""What all tests share: the mode of the process, generated code in a folder of its own, hypothesis profiles.

A process is interpreted or compiled, never both: `TRITON_INTERPRET=1 pytest tests/interpreted` runs the kernels in
Triton's interpreter, `pytest tests` everything else.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture import providers

from kvdsl.interpreting import interpreted

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as many tests as processors run at a time, in processes of their own
INTERPRETED = interpreted()
collect_ignore = [] if INTERPRETED else ["interpreted"]

for name, examples in {"fast": 20, "ci": 100, "thorough": 2000}.items():
    settings.register_profile(
        name,
        max_examples=examples,
        deadline=None,
        derandomize=name != "thorough",  # the same examples every time, so that nothing comes and goes
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow],
    )
# Draws would also be numbers that stand in the modules imported so far, which differ from worker to worker.
providers._get_local_constants = lambda: providers._local_constants
settings.load_profile(os.environ.get("KVDSL_PROFILE", "fast"))


def _own_cache_folder() -> None:
    """Generated code goes into a folder of this run; the models and texts a user has already fetched are seen in it."""
    from kvdsl.models.fetch import cache_folder

    fetched = cache_folder()
    fetched.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="kvdsl-tests-"))
    (folder / "files").symlink_to(fetched.resolve(), target_is_directory=True)
    os.environ["KVDSL_CACHE_DIR"] = str(folder)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)


if INTERPRETED:
    import quick_interpreter

    quick_interpreter.remember()


if "PYTEST_XDIST_WORKER" not in os.environ:  # a worker inherits the folder of the run
    _own_cache_folder()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For a module whose operations are small."""
    import tiny

    with tiny.one_thread():
        yield


@pytest.fixture(scope="module")
def small() -> tuple[Any, Any]:
    """A tiny model and its tokenizer, loaded."""
    import tiny

    return tiny.plain(tiny.model("llama")), tiny.characters()


def pytest_report_header() -> str:
    how = "interpreted" if INTERPRETED else "not run; TRITON_INTERPRET=1 pytest tests/interpreted runs them"
    return f"generated Triton kernels: {how}; hypothesis profile {settings.get_current_profile_name()}"
