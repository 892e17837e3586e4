"""How messages name values, kinds and lists of words."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from .part import Part


def said(value: Any, most: int = 60) -> str:
    """repr for a message: short, and never raising (an int of 5000 digits refuses to be printed)."""
    try:
        text = repr(value)
    except Exception:
        digits = f" of about {int(value.bit_length() * 0.30103)} digits" if isinstance(value, int) else ""
        text = f"<{type(value).__name__}{digits}>"
    return text if len(text) <= most else text[: most - 3] + "..."


def closest(word: Any, known: Sequence[str]) -> str | None:
    """The known name that looks most like `word`, if any does."""
    if not isinstance(word, str):
        return None
    lower = word[:100].lower()
    near = difflib.get_close_matches(lower, known, 1, 0.5) or [k for k in known if lower and k.startswith(lower)]
    return near[0] if near else None


def listed(words: Sequence[str]) -> str:
    """`a, b or c`."""
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def kind_of(value: Any) -> str:
    """What a value is, for a message, as `an int`."""
    return "nothing" if value is None else named(type(value))


def named(kind: type) -> str:
    own = kind.__module__ == "builtins" or issubclass(kind, Part)
    name = kind.__name__ if own else f"{kind.__module__}.{kind.__name__}"
    return f"an {name}" if name[0] in "aeiouAEIO" else f"a {name}"
