"""Numbers of schemes whose heads have schemes of their own: those of a listed group stand behind `heads[h].`, h its
first head, those of the others without a place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from .head_cache import of_group
from .kernels import Params
from .params import checked, wanted
from .scheme import Scheme
from .shape import Shape

Part = tuple[tuple[int, ...], Scheme, Shape, bool]


def groups(scheme: Scheme, shape: Shape) -> Iterator[Part]:
    """(heads, their scheme, the shape it is compiled for, whether they are listed), group by group."""
    for heads, one in scheme.by_heads(shape.kv_heads):
        own = replace(shape, kv_heads=len(heads), q_heads=len(heads) * shape.group)
        yield heads, one, own, any(one is listed for _, listed in scheme.heads)


def place(heads: tuple[int, ...], listed: bool) -> str:
    """What stands before the names of a group's numbers."""
    return f"heads[{heads[0]}]." if listed else ""


def wanted_of_heads(scheme: Scheme, shape: Shape) -> dict[str, tuple[int, ...]]:
    """Their names and shapes."""
    found: dict[str, tuple[int, ...]] = {}
    for heads, one, own, listed in groups(scheme, shape):
        found |= {place(heads, listed) + name: sizes for name, sizes in wanted(one, own).items()}
    return found


def checked_of_heads(
    scheme: Scheme, shape: Shape, params: Params | None, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """See `params.checked`; ShapeError names what is missing or does not fit."""
    found: dict[str, Tensor] = {}
    for heads, one, own, listed in groups(scheme, shape):
        ready = checked(one, own, of_group(params or {}, heads, listed), device)
        found |= {place(heads, listed) + name: x for name, x in ready.items()}
    return found
