"""What every constructor of the language shares: a repr a user would have written, `with_`, a walk over the spec."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Self


class _All:
    """The whole axis: all channels of a head, all kv heads of a layer, all tokens."""

    def __repr__(self) -> str:
        return "ALL"

    def __reduce__(self) -> str:
        return "ALL"


ALL = _All()
Count = int | _All
FINEST = 1 << 10
"""Parts that a whole is in, of which shares are several: 1/3 is meant where 0.333333 is said."""
Sizes = tuple[int | float, ...]
"""Of neighbouring stretches: counts, or shares of whatever they are stretches of."""


def counted(sizes: Sizes, whole: int) -> tuple[int, ...]:
    """How many of `whole` numbers each stretch has."""
    return tuple(size if isinstance(size, int) else round(size * whole) for size in sizes)


def shares(sizes: Sizes) -> tuple[Fraction, ...]:
    """The part of the whole that each stretch is: of counts, of what they are together."""
    together = sum(size for size in sizes if isinstance(size, int))
    return tuple(Fraction(s, together) if isinstance(s, int) else Fraction(s).limit_denominator(FINEST) for s in sizes)


class Part:
    """A frozen value of the language.  `inner` names the fields that `with_` hands an unknown name down to."""

    inner: ClassVar[tuple[str, ...]] = ()

    def __repr__(self) -> str:
        from .text import spelled

        return spelled(self)

    def with_(self, **changes: Any) -> Self:
        """A copy with fields replaced; a name this part lacks goes down to every inner part that has it.

        A dotted path (`{"keys.scale.dtype": "bf16"}`) reaches one inner field.  Raises TypeError for a name nobody has.
        """
        own = {f.name for f in dc.fields(self)}  # type: ignore[arg-type]
        if "both" in changes and {"keys", "values"} <= own:
            changes |= {"keys": changes["both"], "values": changes.pop("both")}
        new = {name: value for name, value in changes.items() if name in own}
        for name, value in changes.items():
            if name in own:
                continue
            head, _, rest = name.partition(".")
            if rest and head in own and isinstance(inner := new.get(head, getattr(self, head)), Part):
                new[head] = inner.with_(**{rest: value})
            elif not self._hand_down(name, value, new):
                raise TypeError(f"{type(self).__name__} and its parts have no field {name!r}")
        return dc.replace(self, **new)  # type: ignore[type-var]

    def _hand_down(self, name: str, value: Any, new: dict[str, Any]) -> bool:
        found = False
        for field in self.inner:
            held = new.get(field, getattr(self, field))
            parts = held if isinstance(held, tuple) else (held,)
            changed = tuple(_changed(part, name, value) for part in parts)
            if any(part is not None for part in changed):
                both = tuple(old if part is None else part for part, old in zip(changed, parts, strict=True))
                new[field] = both if isinstance(held, tuple) else both[0]
                found = True
        return found

    def to_dict(self) -> dict[str, Any]:
        """A tree of dicts, lists, strings and numbers: `part`, and the fields that differ from their default."""
        from .text import to_dict

        return to_dict(self)

    def walk(self, path: str = "") -> Iterator[tuple[str, Part]]:
        """This part and every part inside it, each with its dotted path in the spec."""
        yield path, self
        for field in dc.fields(self):  # type: ignore[arg-type]
            value, place = getattr(self, field.name), f"{path}.{field.name}".lstrip(".")
            if isinstance(value, Part):
                yield from value.walk(place)
            elif isinstance(value, tuple) and value and all(isinstance(item, Part) for item in value):
                for position, item in enumerate(value):
                    yield from item.walk(f"{place}[{position}]")


def _changed(part: Any, name: str, value: Any) -> Part | None:
    """The part with a field replaced; None where neither it nor a part inside it has such a field."""
    if not isinstance(part, Part):
        return None
    try:
        return part.with_(**{name: value})
    except TypeError:
        return None


@dataclass(frozen=True, repr=False)
class Block(Part):
    """The set of numbers that share one scale: `tokens` x `channels` x `heads`."""

    tokens: Count = 1
    channels: Count = ALL
    heads: Count = 1
