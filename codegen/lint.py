"""Whether generated Triton text may be loaded: parsed, and every rule of `lint_safety` and `lint_meaning` asked."""

from __future__ import annotations

from collections.abc import Sequence

from . import lint_meaning, lint_safety
from .launch import Launch
from .lint_text import Text

MOST_LINES = 10000
RULES = (*lint_safety.RULES, *lint_meaning.RULES)


def faults_in(text: str, launches: Sequence[Launch] = ()) -> list[str]:
    """Everything wrong with generated text, as "line N: sentence"; empty if it may be loaded.

    `launches` tell the types of pointers, without which bfloat16 arithmetic cannot be seen.
    """
    if text.count("\n") > MOST_LINES:
        return [f"line {MOST_LINES}: more than {MOST_LINES} lines"]
    try:
        parsed = Text(text, launches)
    except (SyntaxError, ValueError, RecursionError) as error:
        return [f"line {getattr(error, 'lineno', None) or 1}: no Python text ({error})"]
    found = {fault for rule in RULES for fault in rule(parsed)}
    return [f"line {line}: {sentence}" for line, sentence in sorted(found)]
