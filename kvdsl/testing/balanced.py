"""Tiles that are divided by factors of their own: how far a decoded number may be off, and what a NaN moves."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvdsl.reference import balance
from kvdsl.scheme import Scheme, Store

from .formats import LARGEST


def scaled(scheme: Scheme) -> bool:
    """Whether codes stay as they are where all numbers grow alike: factors of tiles have bounds that do not."""
    return scheme.keys.balance is None and scheme.values.balance is None


def moved(x: Tensor, store: Store) -> Tensor:
    """Which numbers of x (B, H, T, D) may decode to others where some of them are NaN, since their factors do."""
    if store.balance is None:
        return torch.zeros_like(x, dtype=torch.bool)
    tiles = x.isnan().unflatten(2, (-1, store.balance.tokens)).any(-1, keepdim=True).any(-2, keepdim=True)
    return tiles.expand(*tiles.shape[:3], store.balance.tokens, x.shape[3]).flatten(2, 3)


def bound(store: Store, x: Tensor, within: Callable[[Store, Tensor], Tensor]) -> Tensor:
    """That of the numbers over their factors, times these, and what dividing and multiplying round; `within` is it of a
    store without them.  Where a factor is stored as 0 everything decodes to 0."""
    assert store.balance is not None
    factors = balance.balancing(x.double(), store.balance, of_tokens=store.of_tokens)
    each = balance.spread(factors, store.balance, of_tokens=store.of_tokens)
    inside = x.double().clamp(-LARGEST, LARGEST)
    found = within(store.with_(transform=()), balance.divided(inside, each).float()) * each + 2.0**-21 * inside.abs()
    return torch.where(each == 0, inside.abs(), found) + (x.double() - inside).abs()
