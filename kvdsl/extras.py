"""Packages that only some commands need: imported where they are used, and asked for by the extra that brings them."""

from __future__ import annotations

import importlib
from typing import Any


class MissingExtra(ImportError):
    """A package that is not installed; the message is the command that installs it."""


def need(module: str, extra: str) -> Any:
    """The imported module, or MissingExtra naming the extra that brings it: hf, demo, check, search, plot,
    ray, lm-eval, tp."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise
        raise MissingExtra(
            f"{error.name} is not installed; run: pip install 'kvdsl[{extra}]'", name=error.name
        ) from error
