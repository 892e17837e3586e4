"""NVIDIA's checker watches every kernel of one scheme a codec: memory beyond a tensor, races, numbers never written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from walked import NAMES

ROOT = Path(__file__).resolve().parent.parent
CHECKER = shutil.which("compute-sanitizer")
FOUND = 7
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or CHECKER is None, reason="needs a GPU and compute-sanitizer"),
]


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
@pytest.mark.parametrize("name", NAMES)
def test_the_checker_finds_nothing(name: str, tool: str) -> None:
    """Every allocation stands alone, so that what lies behind it belongs to nobody."""
    walk = [sys.executable, str(ROOT / "tests" / "walked.py"), name]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    subprocess.run(walk, env=environment, check=True, timeout=900)  # compiles, so that the checker need not watch it
    checked = [str(CHECKER), "--tool", tool, "--error-exitcode", str(FOUND), *walk]
    environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    done = subprocess.run(checked, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
