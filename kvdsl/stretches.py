"""The stretches of the numbers that a store of Bands codes, as stores of them."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from .codes import Bands
from .part import shares
from .store import Store


@dataclass(frozen=True, repr=False)
class Band(Store):
    """A stretch of the numbers that another store's map gives, as a store of it: no part of a spec.

    first, share   where it begins and what it is, as shares of all that are coded
    channels       of the vector, that one of its numbers tells of
    """

    first: Fraction = Fraction(0)
    share: Fraction = Fraction(1)
    channels: int = 1

    def coded(self, head_dim: int) -> int:
        """How many numbers of a vector of `head_dim` channels the band has."""
        return int(self.width(head_dim) * self.share)

    def measured(self, head_dim: int) -> int:
        """All numbers of the band."""
        return self.coded(head_dim)


def bands(store: Store) -> tuple[Band, ...]:
    """The stretches of a store of Bands: of channels, or behind polar coordinates radii, then the angles level by
    level."""
    assert isinstance(store.code, Bands)
    levels = store.levels
    if store.code.channels:
        parts = [*shares(store.code.channels)]
        channels = [1] * len(parts)
    else:
        parts = [Fraction(1, 2**levels), *(Fraction(1, 2 ** (level + 1)) for level in range(levels))]
        channels = [2**levels, *(2 ** (level + 1) for level in range(levels))]
    return tuple(
        Band(one.code, scale=one.scale, transform=store.transform, first=sum(parts[:i], Fraction(0)), share=parts[i],
             channels=channels[i])
        for i, one in enumerate(store.code.stores)
    )  # fmt: skip
