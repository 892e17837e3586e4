"""`roundtrip`, `scores`, `attend` and `calibrate` of schemes whose heads have schemes of their own: group by group."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .errors import SchemeError
from .head_cache import of_group
from .head_params import place
from .rules import shape_faults
from .scheme import Scheme
from .shape import Shape

Given = dict[str, Any]
Asked = tuple[tuple[int, ...], bool, Scheme, Given]


def each(
    scheme: Scheme, kv_heads: int, head_dim: int, given: Given
) -> Iterator[tuple[tuple[int, ...], bool, Scheme, Given]]:
    """(heads, whether they are listed, their scheme, the arguments for it) of every group: of tensors (B, heads, ...)
    the group's heads, of params its own."""
    if found := shape_faults(scheme, Shape(head_dim, kv_heads)):
        raise SchemeError(found)
    for heads, one in scheme.by_heads(kv_heads):
        listed = any(one is row for _, row in scheme.heads)
        own = {name: _of(x, heads, kv_heads) if isinstance(x, Tensor) else x for name, x in given.items()}
        if given.get("params") is not None:
            own["params"] = of_group(given["params"], heads, listed)
        yield heads, listed, one, own


def by_heads(ask: Callable[..., Any], scheme: Scheme, k: Tensor, **given: Any) -> tuple[Tensor, ...]:
    """What `ask(scheme, **arguments)` gives, tensors (B, heads, ...), of all groups in the order of the heads."""
    kv_heads, order, parts = k.shape[1], list[int](), list[tuple[Tensor, ...]]()
    for heads, _, one, own in each(scheme, kv_heads, k.shape[3], {"k": k, **given}):
        found = ask(one, **own)
        parts.append(found if isinstance(found, tuple) else (found,))
        order += heads
    back = torch.tensor(order).argsort()
    return tuple(_joined(list(same), back, kv_heads) for same in zip(*parts, strict=True))


def calibrated(ask: Callable[..., dict[str, Tensor]], scheme: Scheme, k: Tensor, **given: Any) -> dict[str, Tensor]:
    """What every group takes from data, each name behind its group's place."""
    found: dict[str, Tensor] = {}
    for heads, listed, one, own in each(scheme, k.shape[1], k.shape[3], {"k": k, **given}):
        found |= {place(heads, listed) + name: x for name, x in ask(one, **own).items()}
    return found


def _of(x: Tensor, heads: tuple[int, ...], kv_heads: int) -> Tensor:
    """The heads of a tensor (B, heads, ...); one that has no heads is as it is."""
    if x.dim() < 3:
        return x
    group = x.shape[1] // kv_heads
    return x[:, [head * group + i for head in heads for i in range(group)]].contiguous()


def _joined(parts: list[Tensor], back: Tensor, kv_heads: int) -> Tensor:
    whole = torch.cat(parts, 1)
    group = whole.shape[1] // kv_heads
    return whole[:, (back[:, None] * group + torch.arange(group)).flatten().tolist()]
