"""Numbers of tiers beside their pages: each name stands behind its tier's, as `tiers[0].keys.scale`."""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels import Params
from .params import checked, wanted
from .scheme import SIDES, Scheme
from .segments import Segment, segments
from .shape import Shape


def wanted_of_tiers(scheme: Scheme, shape: Shape) -> dict[str, tuple[int, ...]]:
    """Their names and shapes, without what a tier measures itself."""
    found: dict[str, tuple[int, ...]] = {}
    for number, one in enumerate(segments(scheme)):
        own = {} if one.scheme is None else wanted(one.scheme, shape)
        found |= {f"tiers[{number}].{name}": size for name, size in own.items() if name not in _units(one, shape)}
    return found


def checked_of_tiers(
    scheme: Scheme, shape: Shape, params: Params | None, device: torch.device | str = "cpu"
) -> tuple[dict[str, Tensor], ...]:
    """What each tier's kernels take, see `params.checked`; empty where tokens are dropped.  ShapeError names what is
    missing or does not fit."""
    return tuple(
        {}
        if one.scheme is None
        else checked(one.scheme, shape, _of_tier(params or {}, number) | _units(one, shape), device)
        for number, one in enumerate(segments(scheme))
    )


def _of_tier(params: Params, number: int) -> dict[str, Tensor]:
    prefix = f"tiers[{number}]."
    return {name.removeprefix(prefix): x for name, x in params.items() if name.startswith(prefix)}


def _units(one: Segment, shape: Shape) -> dict[str, Tensor]:
    """Scales of 1 and offsets of 0, for codes of numbers that what was measured is taken out of already."""
    sizes = (shape.kv_heads, shape.head_dim)
    unit = torch.stack([torch.ones(sizes), torch.zeros(sizes)])
    return {f"{side}.scale": unit for side in SIDES if (about := one.of(side)) is not None and about.by == "range"}
