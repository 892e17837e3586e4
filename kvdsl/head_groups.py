"""The kv heads of a layer in groups of like ones, each with its scheme: what is a group's, and joined again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .kernels import Params
from .params import ROPE, within
from .scheme import Scheme


@dataclass(frozen=True)
class HeadGroup:
    """Some of `kv_heads` kv heads and their scheme; `listed`: in the table of heads, else the others."""

    heads: tuple[int, ...]
    scheme: Scheme
    listed: bool
    kv_heads: int

    @property
    def place(self) -> str:
        """What stands before the names of the group's numbers: `heads[h].` of listed ones, h the first of them."""
        return f"heads[{self.heads[0]}]." if self.listed else ""

    def of(self, x: Tensor) -> Tensor:
        """The group's heads of keys, values, queries or labels (B, heads, ...)."""
        return x[:, _places(self.heads, x.shape[1] // self.kv_heads)].contiguous()

    def params(self, params: Params) -> dict[str, Tensor]:
        """The group's numbers under their own names; frequencies of PreRope are of all heads."""
        if not self.listed:
            return {name: x for name, x in params.items() if not name.startswith("heads[")}
        return ({ROPE: params[ROPE]} if ROPE in params else {}) | within(params, self.place)


def head_groups(scheme: Scheme, kv_heads: int) -> tuple[HeadGroup, ...]:
    """The groups of a layer of so many kv heads; one of all where the scheme has no table of heads."""
    listed = [one for _, one in scheme.heads]
    return tuple(
        HeadGroup(heads, one, any(one is other for other in listed), kv_heads)
        for heads, one in scheme.by_heads(kv_heads)
    )


def joined(groups: Sequence[HeadGroup], parts: Sequence[Tensor]) -> Tensor:
    """Parts (B, heads, ...) of the groups, which are all heads, in the order of the layer's."""
    whole = torch.cat(list(parts), 1)
    order = [head for one in groups for head in one.heads]
    back = sorted(range(len(order)), key=order.__getitem__)
    return whole[:, _places(back, whole.shape[1] // len(order))]


def _places(heads: Sequence[int], group: int) -> list[int]:
    """Where the heads stand among as many query heads each."""
    return [head * group + i for head in heads for i in range(group)]
