"""Numbers of schemes whose heads have schemes of their own: those of each group stand behind its place."""

from __future__ import annotations

import torch
from torch import Tensor

from .head_groups import head_groups
from .kernels import Params
from .params import checked, wanted
from .scheme import Scheme
from .shape import Shape


def wanted_of_heads(scheme: Scheme, shape: Shape) -> dict[str, tuple[int, ...]]:
    """Their names and shapes."""
    found: dict[str, tuple[int, ...]] = {}
    for one in head_groups(scheme, shape.kv_heads):
        own = wanted(one.scheme, shape.of_heads(len(one.heads)))
        found |= {one.place + name: sizes for name, sizes in own.items()}
    return found


def checked_of_heads(
    scheme: Scheme, shape: Shape, params: Params | None, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """See `params.checked`; ShapeError names what is missing or does not fit."""
    found: dict[str, Tensor] = {}
    for one in head_groups(scheme, shape.kv_heads):
        ready = checked(one.scheme, shape.of_heads(len(one.heads)), one.params(params or {}), device)
        found |= {one.place + name: x for name, x in ready.items()}
    return found
