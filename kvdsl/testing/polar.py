"""A law of polar coordinates: radius and angle give a vector back, wherever its angles lie on the circle."""

from __future__ import annotations

from dataclasses import replace

import torch

from kvdsl.scheme import SIDES, Float, Polar, Scheme, Store

from .bounds import bound
from .cases import Case, law, require_within
from .data import MODEST
from .trips import roundtrip


def _has_angles(scheme: Scheme) -> bool:
    return scheme.keys.polar or scheme.values.polar


@law("P24", _has_angles, MODEST)
def angles_come_back(case: Case) -> None:
    """P24: vectors whose radii and angles are kept in float32 come back within 2^-20 of each pair's radius, also where
    angles lie a hair on either side of 0, which is a whole turn apart as numbers."""
    exact = Store(Float("fp32"), transform=Polar())
    case = replace(case, scheme=case.scheme.with_(keys=exact, values=exact))
    k, v = case.pair(case.whole)
    for x in (k, v):
        half = x.shape[3] // 2
        x[..., 0] = x[..., 0].abs()
        x[..., half] *= 2.0**-12
    for side, x, got in zip(SIDES, (k, v), roundtrip(case, k, v, {}), strict=True):
        require_within(f"decoded {side}", got, x.double(), bound(exact, x) + 2.0**-140)
        first, second = (part.double() for part in got.chunk(2, -1))
        given = x.double().unflatten(-1, (2, -1)).square().sum(-2)
        require_within(f"squared radii of {side}", first.square() + second.square(), given, given * 2.0**-20 + 1e-60)
        assert torch.isfinite(got).all()
