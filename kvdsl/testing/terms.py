"""What a side's terms are of: each codes what the one before it left; and what bands are of, stretches of a row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from kvdsl.kernels import Params
from kvdsl.reference.quantize import Quantized, links, maps, widened
from kvdsl.reference.rounding import LARGEST_INPUT
from kvdsl.reference.spaces import Maps, by_head, encoded, restored, without_rope
from kvdsl.scheme import Bands, Parted, Store, bands


class TermOf(NamedTuple):
    """One term of a tensor: its store alone, the place of its parameters, what it codes (B, H, T, D), what it keeps,
    and the parameters; of which numbers alone it is, bool (B, H, T, D), where not of all."""

    store: Store
    place: str
    x: Tensor
    kept: Quantized
    params: Params | None
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
        return outer.with_(code=outer.code.with_(stores=tuple(stores)))


def stretches(store: Store, coded: Tensor) -> Iterator[Stretch]:
    """The stretches of numbers (B, H, T, M) of a store's coded space."""
    if not isinstance(store.code, Bands):
        yield Stretch(store, coded, None)
        return
    pieces = coded.split([int(coded.shape[3] * band.share) for band in bands(store)], -1)
    for index, (band, piece) in enumerate(zip(bands(store), pieces, strict=True)):
        yield Stretch(band, piece, index)


def pieces(store: Store, x: Tensor) -> list[tuple[Store, Tensor]]:
    """Of a store whose stretches are of channels: each as a store, and its channels of x (B, H, T, D); else nothing."""
    if not isinstance(store.code, Bands) or not store.code.channels or store.mapped:
        return []
    stores = [Store(one.code, scale=one.scale) for one in store.code.stores]
    return list(zip(stores, x.split(list(store.code.counts(x.shape[3])), -1), strict=True))


def terms_of(store: Store, x: Tensor, params: Params | None, side: str, at: int = 0) -> Iterator[TermOf]:
    """The terms of x (B, H, T, D), whole blocks, the first token at position `at`; without positions where they come
    off."""
    x = widened(x, side)
    if store.rope is not None:
        assert params is not None
        store, x, params = behind(store, x, params, at)
    for one in links(store, x, params, side, at):
        alone = one.store.alone if isinstance(one.store, Parted) else one.store
        yield TermOf(alone.with_(residual=None), one.place, one.given, one.kept, params, one.mine)


def behind(store: Store, x: Tensor, params: Params, at: int) -> tuple[Store, Tensor, Params]:
    """Of keys x (B, H, T, D) what stands behind rotary positions: the store, x, and the parameters, whose maps stand
    for the rest of the chain."""
    without = store.with_(transform=store.transform[1:])  # type: ignore[index]
    found = maps(store, x.shape[3], x.shape[1], params, "keys")
    x = without_rope(store, widened(x, "keys"), params, "keys", at)
    if found is None:
        return without, x, params
    _, moved, _, shift = found
    encode, decode = (by_head(matrix, x.shape[1], store.joined) for matrix in found[::2])
    given = {"encode": encode, "encode_shift": -moved, "decode": decode, "decode_shift": shift}
    return without, x, {**params, **{f"keys.{name}": numbers for name, numbers in given.items()}}


def left_out(x: Tensor, mapped: Maps) -> Tensor:
    """How far finite x (B, H, T, D) is from what its numbers in another space, fewer ones, give back."""
    clean = x.double().clamp(-LARGEST_INPUT, LARGEST_INPUT)
    return (clean - restored(encoded(clean, mapped), mapped)).abs()
