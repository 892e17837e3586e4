"""Shipped schemes with tiers, their windows short, so that a few tokens are enough for many decisions; and some whose
keys are stored before their rotary positions."""

from __future__ import annotations

from typing import Any

import kvdsl
from kvdsl.scheme import (
    Largest,
    PreRope,
    Recent,
    Rotate,
    Saliency,
    Scheme,
    Sinks,
    Store,
    Tier,
    Uniform,
    per_channel,
    per_token,
)
from kvdsl.shape import Shape
from kvdsl.testing import Case

SHIPPED = tuple(name for name in kvdsl.names() if kvdsl.load(name).routed)


def short(name: str) -> Scheme:
    """A shipped scheme that decides every few tokens, behind a window of a few; blocks of channels are short, too."""
    scheme = kvdsl.load(name)
    changes: dict[str, Any] = {}
    if scheme.recent is not None:
        changes["recent"] = Recent(32 if scheme.recent.flush == "whole" else 16, scheme.recent.flush)
    if scheme.keys.feedback is not None:
        changes["keys"] = scheme.keys.with_(feedback=scheme.keys.feedback.with_(channels=16))
    if scheme.router is not None and isinstance(scheme.router.every, int) and scheme.router.every > 12:
        changes["router"] = scheme.router.with_(every=12)
    changes["tiers"] = tuple(
        tier.with_(top=20) if isinstance(tier.top, int) and tier.top > 20 else tier for tier in scheme.tiers
    )
    return scheme.with_(**changes)


def case(name: str, backend: str, *, tokens: int = 90, batch: int = 2, seed: int = 1) -> Case:
    """Tokens of a prompt and of steps behind it."""
    return Case(short(name), Shape(64, 2, 4), backend, batch=batch, tokens=tokens, seed=seed)  # type: ignore[arg-type]


FOUR = Store(Uniform(4), scale=per_token())
ROPED = FOUR.with_(transform=PreRope())
TWO = (Tier(4, top=0.5), Tier(2))
ACCUMULATED = Saliency("accumulated", every=5)
KVQUANT = kvdsl.load("kvquant3").keys
BEFORE_ROPE = {
    "new": Scheme(keys=ROPED, values=FOUR, tiers=TWO, router=ACCUMULATED, sinks=Sinks(2), recent=Recent(5)),
    "down": Scheme(
        keys=ROPED, values=FOUR, tiers=TWO, router=ACCUMULATED.with_(moves="down"), sinks=Sinks(1), recent=Recent(3)
    ),
    "any": Scheme(
        keys=FOUR.with_(transform=(PreRope(True), Rotate("hadamard"))), values=FOUR, tiers=TWO, recent=Recent(3),
        router=ACCUMULATED.with_(moves="any"), requantize="on_flush",
    ),
    "some wait in groups": Scheme(
        keys=ROPED.with_(scale=per_channel(tokens=32)), values=FOUR, tiers=TWO, router=Largest(every=7), sinks=Sinks(1)
    ),
    "kvquant in one tier of two": Scheme(
        both=FOUR, tiers=(Tier(4, top=9), Tier(keys=KVQUANT, values=FOUR)), router=Largest(every=7), sinks=Sinks(1)
    ),
    "all of them": Scheme(keys=ROPED, values=FOUR, tiers=(Tier(),), sinks=Sinks(3)),
}  # fmt: skip
"""Schemes with tiers whose keys are stored before their rotary positions."""
