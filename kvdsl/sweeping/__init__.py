"""Many schemes measured alike on one model, and which of them to take: what `kvdsl.sweep` and `kvdsl.recommend` know.

words    values of a spec as a grid writes them
grid     a base scheme and its axes, their combinations, and what is no scheme
results  what was measured of each member
front    which members none dominates
file     all of it in one SQLite file
choice   candidates within a budget, looked at in rounds, and the one that is named

Running them is of the command line's side (codegen/sweep_run.py, codegen/recommending.py), which may ask the compiler.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .choice import Recommendation
    from .grid import Grid
    from .results import Sweep

__all__ = ["Grid", "Recommendation", "Sweep"]
_HOME = {"Grid": "grid", "Recommendation": "choice", "Sweep": "results"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
