"""One process's share of a sweep: `python -m kvdsl.codegen.sweep_worker JOB I N` measures every N-th scheme from the
I-th on, rows into the folder that the job lies in.  A job is a document, so nothing of a process is handed on but text.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from kvdsl.scheme import Scheme

from .running import quiet


def job(
    schemes: Mapping[str, Scheme],
    model: str,
    text: str,
    settings: Mapping[str, Any],
    backend: str | None,
    device: str | None,
) -> dict[str, Any]:
    """What a share is of, as plain values."""
    specs = {name: scheme.to_json() for name, scheme in schemes.items()}
    about = {"model": model, "text": text, "settings": dict(settings), "backend": backend, "device": device}
    return {"schemes": specs, **about}


def measure(told: Mapping[str, Any], folder: Path) -> None:
    """Evaluate a job's schemes; those that do not fit are left to the caller, who says why."""
    from kvdsl.evaluation.run import evaluate
    from kvdsl.evaluation.settings import Settings

    schemes = {name: Scheme.from_json(spec) for name, spec in told["schemes"].items()}
    loaded = _opened(told["model"], told["device"])
    options: dict[str, Any] = {"settings": Settings(**told["settings"]), "backend": told["backend"]}
    evaluate(schemes, loaded, text=told["text"], out=folder, leave_out=True, **options)


@cache
def _opened(model: str, device: str | None) -> Any:
    """A process that gets several shares loads its model once."""
    from kvdsl.generation import opened

    return opened(model, device)


if __name__ == "__main__":
    path, first, processes = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    document = json.loads(path.read_text(encoding="utf-8"))
    names = [*document["schemes"]][first::processes]
    quiet()
    measure({**document, "schemes": {name: document["schemes"][name] for name in names}}, path.parent)
