"""What can be wrong with a user's input, each said as place, fact and mend."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One mistake in a spec: where it stands (dotted path), what is wrong (with both numbers), what would be right."""

    place: str
    fact: str
    mend: str

    def __str__(self) -> str:
        return f"{self.place}: {self.fact}; {self.mend}"


class SchemeError(ValueError):
    """A spec that cannot be compiled.  `faults` holds every mistake found."""

    def __init__(self, faults: tuple[Fault, ...]) -> None:
        self.faults = faults
        super().__init__("\n".join(map(str, faults)))


class ShapeError(ValueError):
    """A tensor or a shape that does not fit the scheme or the kernels."""


class BackendError(RuntimeError):
    """A backend that cannot run here, and what to do about it."""


class ProofError(RuntimeError):
    """A lowering that could not be proven equal to the definition: it is not emitted."""


class CacheError(RuntimeError):
    """An operation that a cache refuses; the cache is as it was."""
