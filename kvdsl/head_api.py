"""`roundtrip`, `scores`, `attend` and `calibrate` of schemes whose heads have schemes of their own: group by group."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from .head_groups import HeadGroup, head_groups, joined
from .rules import refuse_for
from .scheme import Scheme
from .shape import Shape

Given = dict[str, Any]


def by_heads(ask: Callable[..., Any], scheme: Scheme, k: Tensor, **given: Any) -> tuple[Tensor, ...]:
    """What `ask(scheme, **arguments)` gives, tensors (B, heads, ...), of all groups in the order of the heads."""
    groups, parts = list[HeadGroup](), list[tuple[Tensor, ...]]()
    for one, own in _each(scheme, k, given):
        found = ask(one.scheme, **own)
        groups.append(one)
        parts.append(found if isinstance(found, tuple) else (found,))
    return tuple(joined(groups, same) for same in zip(*parts, strict=True))


def calibrated(ask: Callable[..., dict[str, Tensor]], scheme: Scheme, k: Tensor, **given: Any) -> dict[str, Tensor]:
    """What every group takes from data, each name behind its group's place."""
    found: dict[str, Tensor] = {}
    for one, own in _each(scheme, k, given):
        found |= {one.place + name: x for name, x in ask(one.scheme, **own).items()}
    return found


def _each(scheme: Scheme, k: Tensor, given: Given) -> Iterator[tuple[HeadGroup, Given]]:
    """Every group with the arguments for it: of tensors (B, heads, ...) the group's heads, of params its own."""
    refuse_for(scheme, Shape(k.shape[3], k.shape[1]))
    for one in head_groups(scheme, k.shape[1]):
        own = {name: _of(one, x) for name, x in {"k": k, **given}.items()}
        if given.get("params") is not None:
            own["params"] = one.params(given["params"])
        yield one, own


def _of(group: HeadGroup, x: Any) -> Any:
    """The group's heads of a tensor (B, heads, ...), or of several; anything else as it is."""
    if isinstance(x, tuple):
        return tuple(_of(group, part) for part in x)
    return group.of(x) if isinstance(x, Tensor) and x.dim() > 2 else x
