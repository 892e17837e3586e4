"""Random schemes with one field spoiled, for the errors that must name it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from kvdsl.scheme import SIDES, Scheme, Store

from .strategies import Draw, schemes

WRONG: dict[str, tuple[Any, ...]] = {
    "code.bits": (0, 9, -1, True, 4.0, "4", 10**9, math.nan),
    "code.levels": (0, 257, 2.5, "16", True),
    "code.grid": ("end", "", None, 3),
    "code.rounding": ("up", "EVEN", None),
    "code.weights": ("hessian", "Fisher", 1),
    "code.match": ("norm", "Moments", 1),
    "code.format": ("fp8", "float16", None),
    "scale.block.tokens": (0, -1, 513, 1.5, "32", None, False),
    "scale.block.channels": (0, -8, 257, 8.5, None),
    "scale.block.heads": (0, -1, 1025, "all", None),
    "scale.range": ("max", "minmax ", 1),
    "scale.quantile": (1.0, 0.0, 1, "half"),
    "scale.clip": (0.0, 4.01, -1.0, math.nan, math.inf, "1", True, (1.0,), (1.0, 5.0)),
    "scale.refit": ("least", "", 1),
    "scale.scale": (1.0, "fp32"),
    "scale.zero": ("max", None, 0),
    "scale.dtype": ("fp8", "float16", None),
    "scale.floor": (-1.0, 2.0, 1, math.nan, None),
    "scale.exponent": ("up", "FLOOR", None),
    "scale.when": ("later", None),
}


@st.composite
def faulty_schemes(draw: Draw) -> tuple[Callable[[], Scheme], str]:
    """(something that builds a legal scheme with one field spoiled, the place that its error must name)."""
    scheme: Scheme = draw(schemes())
    options: list[tuple[str, tuple[Any, ...]]] = [("prefill", ("later", None, 1))]
    if scheme.recent is not None:
        options += [("recent.tokens", (0, -1, 2**21, 1.5, "64", True)), ("recent.flush", ("roll", None))]
    if scheme.sinks is not None:
        options.append(("sinks.tokens", (0, -4, 2**21, 0.5, None)))
    for side in SIDES:
        for field, wrong in WRONG.items():
            if _has(scheme.side(side), field):
                options.append((f"{side}.{field}", wrong))
    place, wrong = draw(st.sampled_from(options))
    value = draw(st.sampled_from(wrong))
    return (lambda: scheme.with_(**{place: value})), place


def _has(store: Store, path: str) -> bool:
    part: Any = store
    for name in path.split("."):
        if part is None or not hasattr(part, name):
            return False
        part = getattr(part, name)
    return True
