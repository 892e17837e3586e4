"""How good a model is through packed caches: `kvdsl.evaluate`, which `kvdsl eval` calls.

settings   what is asked, and how much of it
corpus     a text, parted into what is measured on and what is scored
units      windows and prompts: what every scheme is given alike
filling    a prompt's keys and values, run once, put into any cache
scoring    teacher-forced tokens, greedy ones
layers     errors of each layer's scores and outputs
storage    bytes by what they hold, over lengths
rows       what is measured already, kept in a file
summary    rows put together, with intervals
results    what comes out, there and back as JSON
tables     the same as tables of text
run        all of it
harness    the same for tasks of lm-evaluation-harness
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .results import Evaluation
    from .run import evaluate
    from .settings import FULL, TASKS, Settings

__all__ = ["Evaluation", "FULL", "Settings", "TASKS", "evaluate"]
_HOME = {"Evaluation": "results", "evaluate": "run", "FULL": "settings", "Settings": "settings", "TASKS": "settings"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
