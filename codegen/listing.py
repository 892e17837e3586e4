"""The table of schemes: `kvdsl list`."""

from __future__ import annotations

import sys
from typing import Any

from kvdsl import cost
from kvdsl.registry import load, names
from kvdsl.scheme import Scheme


def rows(head_dim: int | None = None) -> list[dict[str, Any]]:
    """One row a scheme: name, system, source, bits (keys, values, mean) of a packed element at this head_dim, or each
    scheme's own, else 128."""
    found = []
    for name in names():
        scheme = load(name)
        bits = cost.bits(scheme, head_dim)
        sides = {"keys": bits.keys, "values": bits.values, "mean": bits.mean}
        found.append({"name": name, "system": system(name, scheme), "source": scheme.source, "bits": sides})
    return found


def system(name: str, scheme: Scheme) -> str:
    """Who a scheme comes from: the first part of its source, or for a paper what the scheme's file calls it."""
    head = scheme.source.partition(",")[0]
    if not head.startswith("arXiv"):
        return head
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("kvdsl.schemes.") and vars(module).get(name) is scheme:
            return (module.__doc__ or "").partition(":")[0].strip()
    return head
