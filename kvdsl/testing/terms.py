"""What a side's terms are of: each codes what the one before it left; and what bands are of, stretches of a row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from kvdsl.kernels import Params
from kvdsl.reference.quantize import Quantized, links, widened
from kvdsl.scheme import Bands, Parted, Store, bands


class TermOf(NamedTuple):
    """One term of a tensor: its store alone, the place of its parameters, what it codes (B, H, T, D), what it keeps; of
    which numbers alone it is, bool (B, H, T, D), where not of all."""

    store: Store
    place: str
    x: Tensor
    kept: Quantized
    mine: Tensor | None = None


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
    for one in links(store, widened(x, side), params, side, at):
        store = one.store.alone if isinstance(one.store, Parted) else one.store
        yield TermOf(store.with_(residual=None), one.place, one.given, one.kept, one.mine)
