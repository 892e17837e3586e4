"""What a side's terms are of: each codes what the one before it left; and what bands are of, stretches of a row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from kvdsl.kernels import Params
from kvdsl.reference.chosen import among, choose
from kvdsl.reference.quantize import Quantized, links, widened
from kvdsl.scheme import Bands, Chosen, Parted, Store, TopChannels, bands


class TermOf(NamedTuple):
    """One term of a tensor: its store alone, the place of its parameters, what it codes (B, H, T, D), what it keeps; of
    single numbers that are kept as they are also whether each is one (B, H, T, D), and beside channels that are chosen
    anew whether each is of one."""

    store: Store
    place: str
    x: Tensor
    kept: Quantized
    single: Tensor | None = None
    theirs: Tensor | None = None


class Stretch(NamedTuple):
    """Numbers of the coded space with a store of their own: a band, or all of them.

    store    of them alone
    numbers  (B, H, T, M)
    band     which one, None of a whole row
    """

    store: Store
    numbers: Tensor
    band: int | None

    def kept(self, whole: Quantized) -> Quantized:
        """What a store's `whole` keeps of these numbers."""
        return whole if self.band is None else whole.bands[self.band]

    def put(self, outer: Store, store: Store) -> Store:
        """The outer store with another one for these numbers."""
        if not isinstance(outer.code, Bands):
            return store
        stores = list(outer.code.stores)
        stores[self.band or 0] = Store(store.code, scale=store.scale)
        return outer.with_(code=Bands(tuple(stores)))


def stretches(store: Store, coded: Tensor) -> Iterator[Stretch]:
    """The stretches of numbers (B, H, T, M) of a store's coded space."""
    if not isinstance(store.code, Bands):
        yield Stretch(store, coded, None)
        return
    pieces = coded.split([band.coded(coded.shape[3]) for band in bands(store)], -1)
    for index, (band, piece) in enumerate(zip(bands(store), pieces, strict=True)):
        yield Stretch(band, piece, index)


def terms_of(store: Store, x: Tensor, params: Params | None, side: str, at: int = 0) -> Iterator[TermOf]:
    """The terms of x (B, H, T, D), whole blocks, the first token at position `at`."""
    theirs = chosen_of(store, x)
    for one in links(store, widened(x, side), params, side, at):
        single = None if one.picked is None else one.picked.kept
        alone = one.store.with_(residual=None)
        if isinstance(alone, Parted) and not (alone.masked or alone.raised):  # it has the others alone already
            alone = Store(alone.code, scale=alone.scale, transform=alone.transform)
        beside = isinstance(one.store, Parted) or isinstance(one.store.code, Chosen)
        yield TermOf(alone, one.place, one.given, one.kept, single, theirs if beside else None)


def chosen_of(store: Store, x: Tensor) -> Tensor | None:
    """Whether each number of x (B, H, T, D) is of a channel that is chosen anew; None where none is."""
    choice = store.outliers
    if not isinstance(choice, TopChannels) or not choice.online:
        return None
    return among(choose(x, choice), choice, x.shape[3])
