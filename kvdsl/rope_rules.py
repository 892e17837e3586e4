"""What is legal of keys before RoPE: where it comes off, and what may stand behind it."""

from __future__ import annotations

from collections.abc import Iterator

from .errors import Fault
from .scheme import PreRope
from .sites import Site, rule


@rule("~.transform")
def _rope_comes_off_keys_first(site: Site) -> Iterator[Fault]:
    parts = site.store.transform
    for position, part in enumerate(parts):  # type: ignore[arg-type]
        if not isinstance(part, PreRope) or site.inner:
            continue
        if site.place == "values" or site.scheme.keys is site.scheme.values:
            yield Fault(f"values.transform[{position}]", "values carry no RoPE", "remove PreRope()")
        elif position:
            fact = "RoPE comes off before anything else"
            yield site.fault(f"transform[{position}]", fact, "put PreRope() first, once")
        elif site.store.polar:
            at = len(parts) - 1  # type: ignore[arg-type]
            fact = "RoPE turns the angles of pairs and leaves their radii: without it nothing is easier to code"
            yield site.fault(f"transform[{at}]", fact, "leave out PreRope()")
