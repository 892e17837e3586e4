"""What is legal of values that are a stretch of the keys, and of vectors whose stretches say how long they are."""

from __future__ import annotations

from collections.abc import Iterator

from .errors import Fault
from .scheme import Bands, Shared
from .shape import Shape
from .sites import Site, rule

WIDEST_HEAD = 256  # channels of a vector that is one stretch: accumulators of more fill the registers


@rule("~.code", "~.scale", "~.transform", "~.outliers", "~.residual", "keys.code", "keys.transform")
def _shared_values_are_a_stretch_of_keys(site: Site) -> Iterator[Fault]:
    store, keys = site.store, site.scheme.keys
    if not isinstance(store.code, Shared):
        return
    if site.place != "values":
        yield site.fault("code", "only values are shared, and all of them", "write values=Store(Shared())")
        return
    if not isinstance(keys.code, Bands) or keys.code.head_dim is None:
        fact = "nothing says which channels of the keys they are"
        yield site.fault("code", fact, "store keys in Bands((..., ...), channels=(512, 64))")
    elif keys.transform:
        fact = "shared values are channels of the keys as they come"
        yield Fault("keys.transform", fact, "leave transform out, or store values of their own")
    for field in ("scale", "transform", "outliers", "residual"):
        if getattr(store, field):
            yield site.fault(field, "shared values are as the keys have them", f"leave {field} out")


def shape_faults(site: Site, shape: Shape) -> Iterator[Fault]:
    """Stretches that are not all of a head, and heads of one stretch that are too wide."""
    code = site.store.code
    if isinstance(code, Bands) and code.head_dim is not None:
        if code.head_dim != shape.head_dim:
            told = " and ".join(map(str, code.channels))
            fact = f"stretches of {told} channels are {code.head_dim} together, and head_dim is {shape.head_dim}"
            yield site.fault("code.channels", fact, f"use head_dim={code.head_dim}, or other counts")
    elif shape.head_dim > WIDEST_HEAD and not isinstance(code, Shared):
        fact = f"head_dim {shape.head_dim} is more than the {WIDEST_HEAD} that are read as one vector"
        yield site.fault("code", fact, "store stretches of it, as Bands((..., ...), channels=(512, 64))")
