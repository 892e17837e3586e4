"""Whether Triton interprets kernels in this process, or compiles them."""

from __future__ import annotations

import os

INTERPRETER = "TRITON_INTERPRET"
"""Triton's variable.  It is read when Triton is imported, so that it has to be set before Python starts."""
YES = ("1", "true", "yes", "on", "y")


def interpreted() -> bool:
    """What `INTERPRETER` says, of all words that Triton takes for yes."""
    return os.environ.get(INTERPRETER, "").lower() in YES
