"""A law of polar coordinates: radius and angle give a vector back, wherever its angles lie on the circle."""

from __future__ import annotations

from dataclasses import replace

import torch

from kvdsl.scheme import SIDES, Bands, Float, Polar, Scheme, Store

from .bounds import bound
from .cases import Case, law, require_within
from .data import MODEST
from .trips import roundtrip


def _has_angles(scheme: Scheme) -> bool:
    return scheme.keys.polar or scheme.values.polar


@law("P24", _has_angles, MODEST)
def angles_come_back(case: Case) -> None:
    """P24: vectors whose radii and angles are kept in float32 come back within 2^-20 of each pair's radius, or that of
    each block of several levels, also where angles lie a hair on either side of 0, a whole turn apart as numbers."""
    levels = max(case.scheme.keys.levels, case.scheme.values.levels)
    exact = Store(Float("fp32"), transform=Polar())
    if levels > 1:
        exact = Store(Bands((levels + 1) * (Store(Float("fp32")),)), transform=Polar(levels))
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
        block = x.double().unflatten(-1, (2**levels, -1)).square().sum(-2).repeat(1, 1, 1, 2 ** (levels - 1))
        limit = (given * block).sqrt() * levels * 2.0**-20 + block * 2.0**-40 + 1e-60
        require_within(f"squared radii of {side}", first.square() + second.square(), given, limit)
        assert torch.isfinite(got).all()
