"""A store where it stands in a scheme, and the table of rules about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .errors import Fault
from .scheme import Scale, Scheme, Store
from .shape import Shape
from .transforms import Pick


@dataclass(frozen=True)
class Site:
    """One store of a scheme and where it stands: `keys` or `values` (`keys` for both where `both=` gave them), or what
    is left by one of them, as `keys.residual`, that of its outlier channels, as `keys.outliers.store`, or a band of it,
    as `keys.code.stores[0]`.  `pick`: which channels it is of, where not of all."""

    place: str
    store: Store
    scheme: Scheme
    pick: Pick | None = None

    @property
    def side(self) -> str:
        """The side that the store is one of."""
        return self.place.partition(".")[0]

    @property
    def left(self) -> bool:
        """Whether the store is of what another one left."""
        return ".residual" in self.place

    @property
    def apart(self) -> bool:
        """Whether the store is that of outlier channels."""
        return self.place.endswith(".outliers.store")

    @property
    def inner(self) -> bool:
        """Whether the store is of a part of what another one is given."""
        return self.left or self.apart

    def head_dim(self, shape: Shape) -> int:
        """Channels of a head that the store is of."""
        return self.pick.width(shape.head_dim) if self.pick else shape.head_dim

    def said_dim(self, shape: Shape) -> str:
        """The same in words."""
        return f"the {self.head_dim(shape)} channels of the store" if self.pick else f"head_dim {shape.head_dim}"

    @property
    def band(self) -> int | None:
        """Which band of a store this one is of, counted from 0; None for a whole vector's."""
        inside = self.place.rpartition(".stores[")
        return int(inside[2].removesuffix("]")) if inside[1] else None

    @property
    def scale(self) -> Scale | None:
        return self.store.measure

    def fault(self, inner: str, fact: str, mend: str) -> Fault:
        return Fault(f"{self.place}.{inner}", fact, mend)


Rule = Callable[[Site], Iterator[Fault]]
RULES: list[tuple[tuple[str, ...], Rule]] = []


def rule(*reads: str) -> Callable[[Rule], Rule]:
    """Enter a rule into the table with the fields it reads; `~` stands for the side."""

    def enter(function: Rule) -> Rule:
        RULES.append((reads, function))
        return function

    return enter
