"""Channels that are chosen anew: which numbers are theirs, and how far what is kept beside them may be off."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvdsl.scheme import Chosen, Parted, Store

from .formats import LARGEST, deviation
from .terms import TermOf


def beside(term: TermOf, x: Tensor, within: Tensor, bound: Callable[[Store, Tensor], Tensor]) -> Tensor:
    """What bounds |x - x^| behind a term of chosen channels, or beside it, where `within` did before; `bound` is that
    of a store alone.

    A term of some channels leaves the others as they were.  One of all says of chosen channels what its codes do of a
    number of 0, which is added up; or, where they have more bits, the lowest of them alone, and with the bits above
    these the error is that of a store of so many."""
    store, theirs = term.store, term.theirs
    assert theirs is not None
    if isinstance(store.code, Chosen):
        return torch.where(theirs, _kept(term, store.code, x, bound), within)
    if not isinstance(store, Parted):
        found = bound(store, term.x)
        return torch.where(theirs, within + found, found)
    found = bound(Store(store.code, scale=store.scale), term.x)
    if store.masked:
        return torch.where(theirs == store.top, found, within)
    return torch.where(theirs, within + term.kept.decoded.abs(), found)


def _kept(term: TermOf, code: Chosen, x: Tensor, bound: Callable[[Store, Tensor], Tensor]) -> Tensor:
    """The bound at chosen channels: of float16 numbers, or of all bits."""
    if code.below:
        many = code.choice.store
        return bound(Store(many.code, scale=many.scale), x)
    numbers = term.x.abs().clamp(max=LARGEST)
    return deviation(numbers, "fp16") + term.x.abs() - numbers
