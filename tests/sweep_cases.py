"""A small sweep, and a count of what is measured that can stop it, for the tests of sweeps and of choices."""

from __future__ import annotations

from typing import Any

import pytest
import tiny

import kvdsl
from kvdsl.evaluation import run

SMALL = tiny.SETTINGS.with_(tasks=("perplexity",), windows=2, sizes=(150,), resamples=50)
GRID = {"base": "token2", "axes": {"bits": [2, 4], "recent": [0, 32]}}


def of(loaded: tiny.Loaded, grid: Any = GRID, **options: Any) -> Any:
    return kvdsl.sweep(grid, loaded, text=tiny.TEXT, settings=SMALL, **{"compiled": False, **options})


class Measured:
    """How many rows are measured from now on; in place of another one than `stop` comes what Ctrl-C raises."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop: int | None = None) -> None:
        self.rows, self.stop = 0, stop
        act = run._Act.__call__

        def counting(unit: Any, *of: Any) -> Any:
            if self.rows == self.stop:
                raise KeyboardInterrupt
            self.rows += 1
            return act(unit, *of)

        monkeypatch.setattr(run._Act, "__call__", counting)
