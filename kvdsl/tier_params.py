"""Numbers of tiers beside their pages: each name stands behind its tier's, as `tiers[0].keys.scale`, but for the
frequencies of PreRope, which may be given once."""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels import Params
from .params import ROPE, checked, wanted, within
from .scheme import SIDES, Scheme
from .segments import Segment, segments
from .shape import Shape


def wanted_of_tiers(scheme: Scheme, shape: Shape) -> dict[str, tuple[int, ...]]:
    """Their names and shapes, without what a tier measures itself."""
    found: dict[str, tuple[int, ...]] = {}
    for number, one in enumerate(segments(scheme)):
        if one.scheme is not None:
            own = wanted(one.scheme, shape).items()
            found |= {f"tiers[{number}].{name}": size for name, size in own if name not in measured_scales(one)}
    return found


def checked_of_tiers(
    scheme: Scheme, shape: Shape, params: Params | None, device: torch.device | str = "cpu"
) -> tuple[dict[str, Tensor], ...]:
    """What each tier's kernels take, see `params.checked`; empty where tokens are dropped.  ShapeError names what is
    missing or does not fit."""
    found = []
    for number, one in enumerate(segments(scheme)):
        given = of_tier(params or {}, number) | dict.fromkeys(measured_scales(one), _unit(shape))
        found.append({} if one.scheme is None else checked(one.scheme, shape, given, device))
    return tuple(found)


def of_tier(params: Params, number: int) -> dict[str, Tensor]:
    """What is given for one tier; the model's frequencies may stand for all of them."""
    return ({ROPE: params[ROPE]} if ROPE in params else {}) | within(params, f"tiers[{number}].")


def ropes_of_tiers(scheme: Scheme) -> list[str]:
    """The names of the frequencies of tiers whose keys are stored without their rotary positions."""
    each = enumerate(segments(scheme))
    return [f"tiers[{i}].{ROPE}" for i, one in each if one.scheme is not None and one.scheme.keys.rope is not None]


def measured_scales(one: Segment) -> list[str]:
    """The scales of codes of numbers that what was measured is taken out of already."""
    return [f"{side}.scale" for side in SIDES if (about := one.of(side)) is not None and about.by == "range"]


def _unit(shape: Shape) -> Tensor:
    """Scales of 1 and offsets of 0."""
    sizes = (shape.kv_heads, shape.head_dim)
    return torch.stack([torch.ones(sizes), torch.zeros(sizes)])
