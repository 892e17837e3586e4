"""Shipped schemes with tiers, their windows short, so that a few tokens are enough for many decisions."""

from __future__ import annotations

from typing import Any

import kvdsl
from kvdsl.scheme import Recent, Scheme
from kvdsl.shape import Shape
from kvdsl.testing import Case

SHIPPED = tuple(name for name in kvdsl.names() if kvdsl.load(name).routed)


def short(name: str) -> Scheme:
    """A shipped scheme that decides every few tokens, behind a window of a few."""
    scheme = kvdsl.load(name)
    changes: dict[str, Any] = {}
    if scheme.recent is not None:
        changes["recent"] = Recent(16, scheme.recent.flush)
    if scheme.router is not None and isinstance(scheme.router.every, int) and scheme.router.every > 12:
        changes["router"] = scheme.router.with_(every=12)
    changes["tiers"] = tuple(
        tier.with_(top=20) if isinstance(tier.top, int) and tier.top > 20 else tier for tier in scheme.tiers
    )
    return scheme.with_(**changes)


def case(name: str, backend: str, *, tokens: int = 90, batch: int = 2, seed: int = 1) -> Case:
    """Tokens of a prompt and of steps behind it."""
    return Case(short(name), Shape(64, 2, 4), backend, batch=batch, tokens=tokens, seed=seed)  # type: ignore[arg-type]
