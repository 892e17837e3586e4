"""What is legal of queries that are rounded before they meet packed keys: what rounds them, and keys that let it."""

from __future__ import annotations

from collections.abc import Iterator

from .errors import Fault
from .kinds import KINDS, one_of
from .scheme import Float, LowRank, Scale, Scheme, Sketch, Store, Uniform
from .shape import Shape
from .shared_rules import WIDEST_HEAD
from .sites import RULES, Site

KINDS[Scheme]["queries"] = one_of('queries=Store(Float("e4m3"))', Store, optional=True)


def faults(scheme: Scheme) -> Iterator[Fault]:
    """The mistakes of `queries`, in a scheme whose fields each hold the right kind of thing."""
    store = scheme.queries
    if store is None:
        return
    if scheme.routed or scheme.router is not None:
        fact = "what is measured of a tier goes onto the query, which would be rounded otherwise for each of them"
        yield Fault("queries", fact, "leave it out, or tiers, router and requantize")
        return
    found = (*_alone(store), *_measured(store))
    yield from found or (fault for _, check in RULES for fault in check(Site("queries", store, scheme)))
    yield from _of_keys(scheme.keys)


def _alone(store: Store) -> Iterator[Fault]:
    code = store.code
    if not isinstance(code, (Float, Uniform)):
        fact = "a query is rounded to numbers that products take as they are"
        yield Fault("queries.code", fact, "use a small float, as Float('e4m3'), or Uniform(8)")
    elif isinstance(code, Float) and code.plain:
        fact = f"{code.format} rounds no more off a query than products do"
        yield Fault("queries.code", fact, "leave queries out, or use Float('e4m3')")
    for field in ("transform", "outliers", "residual", "feedback"):
        if getattr(store, field):
            fact = "a query goes through the keys' own transforms, and all that these give is rounded alike"
            yield Fault(f"queries.{field}", fact, f"leave {field} out")


def _measured(store: Store) -> Iterator[Fault]:
    """A scale of one query alone, of its largest number."""
    scale = store.measure
    if store.scale is None or scale is None:  # a sketch has a scale of its own
        return
    block, at = scale.block, "queries.scale"
    if scale.when != "online" or scale.scale is not None:
        yield Fault(f"{at}.{'when' if scale.when != 'online' else 'scale'}", *_OF_DATA)
    elif block.tokens != 1 or block.heads != 1:
        fact = "queries come one by one, each head's for itself"
        yield Fault(f"{at}.block", fact, "use per_token(channels=32, ...)")
    elif isinstance(block.channels, int) and block.channels & (block.channels - 1):
        fact = f"groups of {block.channels} channels are no power of two"
        yield Fault(f"{at}.block.channels", fact, f"use {1 << block.channels.bit_length() - 1} or ALL")
    yield from _of_top(scale)


_OF_DATA = "a query is rounded by its own numbers, and by nothing that data was asked for", "use an online scale alone"


def _of_top(scale: Scale) -> Iterator[Fault]:
    at = "queries.scale"
    if scale.range != "absmax":
        fact = f"the scale of a query is of its largest number, and not of {scale.range}"
        yield Fault(f"{at}.range", fact, "use range='absmax'")
    if isinstance(scale.clip, tuple):
        yield Fault(f"{at}.clip", "nothing is searched for a query", "give one number, as 1.0")
    for field in ("quantile", "refit"):
        if getattr(scale, field) is not None:
            fact = f"the scale of a query is of its largest number, and {field} makes it another one"
            yield Fault(f"{at}.{field}", fact, f"leave {field} out")


def _of_keys(keys: Store) -> Iterator[Fault]:
    """Keys whose packed tokens all meet one and the same vector, a map of the query."""
    if keys.rope is not None:
        fact = "keys before RoPE meet the query turned to the position of each token, which is rounded for none"
        yield Fault("queries", fact, "leave it out, or PreRope() of the keys")
    elif keys.short:
        fact = "a basis of the keys keeps some of its numbers, and a query is rounded in all of them"
        yield Fault("queries", fact, "leave it out, or rank of the keys' Eigenbasis")
    elif keys.outliers is not None or keys.residual is not None:
        what = "outliers" if keys.outliers is not None else "a residual"
        fact = f"keys with {what} are sums, whose terms meet the query each in numbers of its own"
        yield Fault("queries", fact, f"leave it out, or {what.removeprefix('a ')} of the keys")
    elif isinstance(keys.code, (LowRank, Sketch)):
        what = "a sketch is right in the mean for" if isinstance(keys.code, Sketch) else "vectors of low rank meet"
        yield Fault("queries", f"{what} the query itself", "leave it out, or use another code for keys")
    elif keys.joined > 1:
        fact = f"of {keys.joined} heads that are rotated together each meets the query in numbers of all"
        yield Fault("queries", fact, "leave it out, or use Rotate(...) with heads=1 for keys")


def shape_faults(scheme: Scheme, shape: Shape) -> Iterator[Fault]:
    """Groups of channels that do not divide a head, and heads that are too wide."""
    store = scheme.queries
    if store is None:
        return
    if shape.head_dim > WIDEST_HEAD:
        fact = f"head_dim {shape.head_dim} is more than the {WIDEST_HEAD} that are rounded as one query"
        yield Fault("queries", fact, "leave it out")
    channels = store.scale.block.channels if store.scale is not None else None
    if isinstance(channels, int) and shape.head_dim % channels:
        common = shape.head_dim & -shape.head_dim
        fact = f"groups of {channels} channels do not divide head_dim {shape.head_dim}"
        yield Fault("queries.scale.block.channels", fact, f"use {common} or ALL")
