"""A store where it stands in a scheme, and the table of rules about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .errors import Fault
from .scheme import Scale, Scheme, Store


@dataclass(frozen=True)
class Site:
    """One store of a scheme and where it stands: `keys` or `values` (`keys` for both where `both=` gave them)."""

    place: str
    store: Store
    scheme: Scheme

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
