"""What a legal spec is.  Every rule is a small generator of faults; all of them run, so that all mistakes show at once.

A rule says which fields it reads and is skipped where one of them does not even hold the right kind of thing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from . import (  # noqa: F401  (they enter their rules)
    additive_rules,
    balance_rules,
    band_rules,
    basis_rules,
    chosen_rules,
    code_rules,
    feedback_rules,
    low_rank_rules,
    measure_rules,
    outlier_rules,
    polar_rules,
    query_rules,
    residual_rules,
    rope_rules,
    rotation_rules,
    shared_rules,
    sparse_rules,
    tier_rules,
    vector_rules,
)
from .codes import SLOT_TOKENS
from .errors import Fault, SchemeError
from .kinds import misfits
from .scheme import (
    ALL,
    SIDES,
    Balance,
    Band,
    Bands,
    ChannelScale,
    Eigenbasis,
    LowRank,
    Permute,
    Scheme,
    Shared,
    Sketch,
    Sparse,
    Store,
    TopChannels,
)
from .segments import segments
from .shape import Shape
from .sites import RULES, Site, rule
from .transforms import Pick
from .window import TILE

LONGEST_PAGE = 4096  # tokens: a page holds whole blocks of both sides and whole words, or two of each


def faults(scheme: Scheme) -> tuple[Fault, ...]:
    """Every mistake of a spec that needs no shape to be seen."""
    found = [*misfits(scheme)]
    if scheme.keys is scheme.values:
        found = [fault for fault in found if fault.place.partition(".")[0] != "values"]
    bad = {fault.place for fault in found}
    tiered = scheme.routed or scheme.router is not None
    if tiered:
        found += tier_rules.faults(scheme) if not bad else ()
    for site in () if tiered else _sites(scheme):
        for reads, check in RULES:
            if not any(_touch(read.replace("~", site.place), wrong) for read in reads for wrong in bad):
                found += check(site)
    if not bad:
        found += query_rules.faults(scheme)
    for field in ("layers", "heads"):
        if not any(_touch(field, wrong) for wrong in bad):
            found += _rows(field, getattr(scheme, field))
    return tuple(found)


def refuse(scheme: Scheme, given: tuple[str, ...] = ()) -> None:
    """Raise SchemeError with every fault of the spec, if there is one.  `given`: sides given beside `both=`."""
    twice = tuple(Fault("both", f"given together with {side}", f"write either both= or {side}=") for side in given)
    if found := twice + faults(scheme):
        raise SchemeError(found)


def shape_faults(scheme: Scheme, shape: Shape) -> tuple[Fault, ...]:
    """Every mistake of a legal spec that shows only at a shape."""
    if scheme.heads:
        if found := tuple(_astray("heads", scheme.heads, shape.kv_heads, "a layer has {} kv heads", "kv head")):
            return found
        groups = [shape_faults(one, shape.of_heads(len(heads))) for heads, one in scheme.by_heads(shape.kv_heads)]
        return tuple(dict.fromkeys(fault for group in groups for fault in group))
    if scheme.routed:
        parts = [shape_faults(one.scheme, shape) for one in segments(scheme) if one.scheme is not None]
        parts.append(tuple(tier_rules.shape_faults(scheme, shape)))
        return tuple(dict.fromkeys(fault for part in parts for fault in part))
    whole = (site for site in _sites(scheme) if site.band is None)
    faults = [fault for site in whole for one in (site, *_stretches(site, shape)) for fault in _shape(one, shape)]
    return (*faults, *query_rules.shape_faults(scheme, shape))


def refuse_for(scheme: Scheme, shape: Shape) -> None:
    """Raise SchemeError with every fault that the spec has at this shape, if there is one."""
    if found := shape_faults(scheme, shape):
        raise SchemeError(found)


def _sites(scheme: Scheme) -> Iterator[Site]:
    """Every store where it stands, those of residuals and of bands behind theirs; one of both sides once."""
    for side in SIDES[: 1 if scheme.keys is scheme.values else 2]:
        yield from _within(getattr(scheme, side), side, scheme)


def _within(store: Store, place: str, scheme: Scheme, pick: Pick | None = None) -> Iterator[Site]:
    """A store where it stands, and those inside it, as they stand in the spec."""
    found = getattr(store, "outliers", None)
    top = found if isinstance(found, TopChannels) and isinstance(found.n, (int, float)) else None
    parted = top is not None and not top.online
    yield Site(place, store, scheme, Pick(top.n, False) if top and parted else pick)
    for position, band in enumerate(_bands(store)):
        yield Site(f"{place}.code.stores[{position}]", band, scheme)
    if top and isinstance(top.store, Store):
        yield from _within(top.store, f"{place}.outliers.store", scheme, Pick(top.n, True) if parted else None)
    if isinstance(rest := getattr(store, "residual", None), Store):
        yield from _within(rest, f"{place}.residual", scheme)


def _bands(store: Store) -> tuple[Store, ...]:
    """The stores of stretches, as they stand in the spec."""
    code = getattr(store, "code", None)
    stores = code.stores if isinstance(code, Bands) else ()
    return stores if isinstance(stores, tuple) and all(isinstance(one, Store) for one in stores) else ()


def _touch(read: str, wrong: str) -> bool:
    """One path is the other, or lies inside it (`layers[3]` lies inside `layers`)."""
    read, wrong = read + ".", wrong.replace("[", ".[") + "."
    return read.startswith(wrong) or wrong.startswith(read)


def _waiting_in(side: Store) -> int:
    """Tokens that wait for one another on a side, whatever part of it they wait for."""
    return math.lcm(*(_waiting(site.store) for site in _within(side, "", None)))  # type: ignore[arg-type]


def _waiting(store: Store) -> int:
    """Tokens that wait for one another, under an online scale, to be of low rank, or for those of a line: 1 where none
    do, and where a field itself is wrong."""
    scale, code, outliers = (getattr(store, name, None) for name in ("scale", "code", "outliers"))
    found = [code.tokens] if isinstance(code, LowRank) else []
    if getattr(scale, "when", None) == "online":
        found.append(getattr(getattr(scale, "block", None), "tokens", 1))
    found += [part.tokens for part in getattr(store, "transform", ()) if isinstance(part, Balance)]
    if isinstance(outliers, Sparse):
        found += [SLOT_TOKENS, getattr(outliers.line, "tokens", 1)]
    if isinstance(outliers, TopChannels) and type(outliers.per) is int:
        found.append(outliers.per)
    return math.lcm(*(tokens for tokens in found if type(tokens) is int and tokens >= 1))


def _where(store: Store) -> str:
    """The field that says how many tokens wait."""
    if isinstance(store.outliers, Sparse):
        return "outliers"
    if isinstance(store.outliers, TopChannels) and store.outliers.online:
        return "outliers.per"
    if store.balance is not None and store.scale is not None and store.scale.block.tokens == 1:
        return f"transform[{len(store.transform) - 1}].tokens"  # type: ignore[arg-type]
    return "code.tokens" if isinstance(store.code, LowRank) else "scale.block.tokens"


@rule("~.scale.block", "~.scale.when")
def _a_block_is_more_than_one_number(site: Site) -> Iterator[Fault]:
    if site.scale is None or site.scale.when != "online":
        return
    block = site.scale.block
    if block.tokens == 1 and block.channels == 1 and block.heads == 1:
        fact = "a block of one token and one channel codes nothing: lowest and highest are the value itself"
        yield site.fault("scale.block", fact, "use per_token(channels=32)")
    elif block.heads != 1 and block.channels is not ALL:
        yield site.fault("scale.block", "a block over several heads takes all their channels", "use channels=ALL")


@rule("~.scale.block.tokens", "~.scale.when")
def _an_online_block_is_finite(site: Site) -> Iterator[Fault]:
    if site.scale is not None and site.scale.when == "online" and site.scale.block.tokens is ALL:
        fact = "one scale over all tokens cannot be appended to"
        yield site.fault("scale", fact, "use when='calibrated', or a group such as tokens=64")


@rule("~.scale.block.tokens", "~.scale.when", "~.code.tokens", "~.outliers", "recent")
def _a_block_leaves_the_window_whole(site: Site) -> Iterator[Fault]:
    tokens, recent = _waiting(site.store), site.scheme.recent
    if tokens == 1:
        return
    group, at = math.lcm(_waiting_in(site.scheme.keys), _waiting_in(site.scheme.values)), _where(site.store)
    if recent is None:
        fact = f"a group of {tokens} tokens must wait until it is full"
        yield site.fault(at, fact, f"add recent=Recent({group})")
    elif recent.flush == "rolling":
        fact = f"a group of {tokens} tokens must wait until it is full, and a rolling window lets them go one by one"
        yield site.fault(at, fact, f"use Recent({-(-recent.tokens // group) * group})")
    elif recent.tokens % tokens:
        fact = f"a window of {recent.tokens} tokens is no whole number of groups of {tokens}"
        yield site.fault(at, fact, f"use Recent({-(-recent.tokens // group) * group})")


@rule("~.scale.block.tokens", "~.scale.when", "~.code.tokens", "~.outliers")
def _whole_blocks_fit_a_page(site: Site) -> Iterator[Fault]:
    keys, values = _waiting_in(site.scheme.keys), _waiting_in(site.scheme.values)
    page, tokens = math.lcm(TILE, keys, values), _waiting(site.store)
    if page > LONGEST_PAGE and tokens > 1 and (site.side == "keys" or keys == 1):
        more = f"groups of {values} and " if site.side == "keys" and values > 1 else ""
        fact = f"groups of {tokens} tokens, {more}words of {TILE} meet every {page} tokens, a page holds {LONGEST_PAGE}"
        yield site.fault(_where(site.store), fact, f"use {2 ** round(math.log2(tokens))}")


@rule("~.scale.block", "~.scale.when")
def _a_calibrated_scale_knows_no_tokens(site: Site) -> Iterator[Fault]:
    if site.scale is None or site.scale.when != "calibrated":
        return
    block = site.scale.block
    if block.tokens is not ALL:
        fact = f"a calibrated scale is one for all tokens, not one for every {block.tokens}"
        yield site.fault("scale.block.tokens", fact, "use tokens=ALL or when='online'")
    if block.heads not in (1, ALL):
        fact = f"a calibrated scale has an entry for each kv head or one for all, not one for {block.heads}"
        yield site.fault("scale.block.heads", fact, "use 1 or ALL")


@rule("~.scale.zero", "~.scale.when")
def _a_calibrated_scale_stores_its_minimum(site: Site) -> Iterator[Fault]:
    if site.scale is not None and site.scale.when == "calibrated" and site.scale.zero != "min":
        fact = f"a calibrated offset costs no bytes a token, {site.scale.zero!r} saves nothing"
        yield site.fault("scale.zero", fact, "leave zero out")


@rule("~.code", "~.scale", "~.transform")
def _a_sketch_stands_alone(site: Site) -> Iterator[Fault]:
    if not isinstance(site.store.code, Sketch):
        return
    dim = site.store.code.dim
    if isinstance(dim, int) and dim % 8:
        yield site.fault("code.dim", f"{dim} signs fill no whole bytes", f"use {-(-dim // 8) * 8}")
    if site.store.scale is not None:
        yield site.fault("scale", "a sketch is scaled by the norm of the vector", "leave scale out")
    if site.store.transform:
        yield site.fault("transform", "a sketch maps the vector itself", "choose the map by basis=, and leave it out")


@rule("~.transform")
def _queries_balance_keys(site: Site) -> Iterator[Fault]:
    for position, part in enumerate(site.store.transform):  # type: ignore[arg-type]
        if site.side == "values" and isinstance(part, ChannelScale) and part.by == "balance":
            fact = "'balance' weighs keys against queries"
            yield site.fault(f"transform[{position}].by", fact, "on values use 'sqrt_absmax'")
        elif isinstance(part, ChannelScale) and part.by == "balance" and site.store.rope is not None:
            fact = "'balance' weighs a channel of keys against one of queries, and keys before RoPE meet no query"
            yield site.fault(f"transform[{position}].by", fact, "behind PreRope() use 'sqrt_absmax'")
        elif isinstance(part, Eigenbasis) and part.by != "own" and site.store.rope is not None:
            fact = f"{part.by!r} is of the queries that meet keys, and keys before RoPE meet none"
            yield site.fault(f"transform[{position}].by", fact, "behind PreRope() use 'own'")
        elif isinstance(part, Permute) and part.by == "energy" and (site.side == "values" or site.store.rope):
            fact = "'energy' is of keys and of the queries that meet them"
            yield site.fault(f"transform[{position}].by", fact, "on values, and behind PreRope(), use 'range'")


def _rows(field: str, table: Any) -> Iterator[Fault]:
    what, seen = {"layers": "layer", "heads": "kv head"}[field], set[int]()
    for key, inner in table:
        for index in key:
            if index in seen:
                yield Fault(f"{field}[{index}]", f"{what} {index} is listed twice", f"name every {what} once")
            seen.add(index)
        if inner.layers:
            yield Fault(f"{field}[{key[0]}]", f"a {what}'s scheme has layers of its own", "flatten the table")
        if inner.heads and field == "heads":
            yield Fault(f"{field}[{key[0]}]", f"a {what}'s scheme has heads of its own", "flatten the table")


def layer_faults(scheme: Scheme, layers: int) -> tuple[Fault, ...]:
    """Every mistake in `Scheme.layers` that shows only once the number of layers is known."""
    return tuple(_astray("layers", scheme.layers, layers, "the model has {} layers", "layer"))


def _astray(field: str, table: Any, count: int, fact: str, what: str) -> Iterator[Fault]:
    """Indices beyond `count`, and two that mean the same."""
    seen = dict[int, int]()
    for key, _ in table:
        for index in key:
            at = index + count if index < 0 else index
            if not 0 <= at < count:
                yield Fault(f"{field}[{index}]", fact.format(count), f"use an index from {-count} to {count - 1}")
            elif at in seen:
                same = f"of {count} {what}s this is {what} {at}, which is listed as {seen[at]}, too"
                yield Fault(f"{field}[{index}]", same, f"name every {what} once")
            seen.setdefault(at, index)


def _shape(site: Site, shape: Shape) -> Iterator[Fault]:
    band, code = isinstance(site.store, Band), site.store.code
    yield from outlier_rules.shape_faults(site, shape)
    yield from sparse_rules.shape_faults(site, shape)
    yield from chosen_rules.shape_faults(site, shape)
    yield from (*shared_rules.shape_faults(site, shape), *band_rules.shape_faults(site, shape)) if not band else ()
    if site.head_dim(shape) < 1 or isinstance(code, Shared):
        return
    yield from (*rotation_rules.shape_faults(site, shape), *basis_rules.shape_faults(site, shape)) if not band else ()
    if isinstance(code, Sketch) and code.basis == "hadamard" and shape.head_dim.bit_count() > 1:
        fact = f"a Hadamard basis needs a power of two, and head_dim is {shape.head_dim}"
        yield site.fault("code.basis", fact, "use basis='orthogonal'")
    yield from polar_rules.shape_faults(site, shape) if not band else ()
    yield from vector_rules.shape_faults(site, shape)
    yield from additive_rules.shape_faults(site, shape)
    if site.scale is None:
        return
    block, size, heads = site.scale.block, site.store.coded(site.head_dim(shape)), shape.kv_heads
    if isinstance(block.channels, int) and size % block.channels:
        common = math.gcd(block.channels, size)
        mend = f"use {common} or ALL" if common > 1 else "use ALL"
        kept = "of a stretch" if band else "that are kept" if site.store.short else ""
        what = f"the {size} numbers {kept}" if kept else site.said_dim(shape)
        yield site.fault("scale.block.channels", f"groups of {block.channels} channels do not divide {what}", mend)
    if isinstance(block.heads, int) and heads % block.heads:
        fits = [str(n) for n in range(1, heads + 1) if heads % n == 0]
        mend = f"use {', '.join(fits)} or ALL"
        yield site.fault("scale.block.heads", f"{block.heads} heads do not divide {heads} kv heads", mend)


def _stretches(site: Site, shape: Shape) -> Iterator[Site]:
    """The bands of a legal store, as stores of their stretch, where these are stretches of a head."""
    if isinstance(site.store.code, Bands) and site.store.code.head_dim in (None, shape.head_dim):
        for position, band in enumerate(site.store.terms):
            yield Site(f"{site.place}.code.stores[{position}]", band, site.scheme)
