"""Generated source as files to read: `kvdsl emit`."""

from __future__ import annotations

import re
from pathlib import Path

from kvdsl.kernels import Backend
from kvdsl.scheme import Scheme
from kvdsl.segments import shaped
from kvdsl.shape import Shape

from . import render, store
from .plan import plan_for


def emitted(scheme: Scheme, shape: Shape, name: str, backend: Backend, out: Path) -> list[Path]:
    """The files written into the folder `out`, which is made if it is not there: one, or of a scheme with tiers one for
    each, and for its exact tokens."""
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for place, (part, its) in shaped(scheme, shape).items():
        called = re.sub(r"\W+", "_", f"{name} {place}".strip()).strip("_")
        files.append(out / f"{called}_{backend}.py")
        store.write(files[-1], render(plan_for(part, its), backend, called))
    return files
