"""What is legal of outlier channels that are chosen anew every few tokens: keys, and codes that can stand beside."""

from __future__ import annotations

from collections.abc import Iterator

from .errors import Fault
from .outlier_rules import nothing_left
from .scheme import ALL, Float, Sketch, Store, TopChannels, Uniform
from .shape import Shape
from .sites import Site, rule

SUB_TILE = 32  # tokens that are read at once: they share a choice
PLANES = (1, 2, 4)  # more bits of chosen channels: as many tokens as fill a byte stand in one


def choice(site: Site) -> TopChannels | None:
    """The outlier channels of a store, where they are chosen anew."""
    found = getattr(site.store, "outliers", None)
    return found if isinstance(found, TopChannels) and found.online else None


@rule("~.outliers")
def _outliers_are_chosen_for_some_tokens_or_for_all(site: Site) -> Iterator[Fault]:
    top = site.store.outliers
    if not isinstance(top, TopChannels) or top.when is None:
        return
    if top.when == "online" and top.per is ALL:
        fact = "the largest channels of all tokens are not known while some are to come"
        yield site.fault("outliers.per", fact, "use per=32, or when='calibrated'")
    elif top.when == "calibrated" and top.per is not ALL:
        fact = f"channels that calibration finds are the same for all tokens, not for every {top.per}"
        yield site.fault("outliers.per", fact, "leave per out, or when")


@rule("~.outliers")
def _channels_are_chosen_of_whole_sub_tiles(site: Site) -> Iterator[Fault]:
    top = choice(site)
    if top is None:
        return
    if site.side == "values" or site.scheme.keys is site.scheme.values:
        fact = "sums of values would need an output of their own for every choice"
        mend = "use per=ALL" if site.side == "values" else "use per=ALL, or give keys= and values= apart"
        yield site.fault("outliers.per", fact, mend)
    if top.tokens % SUB_TILE:
        fact = f"{top.tokens} tokens are no whole number of the {SUB_TILE} that are read at once"
        yield site.fault("outliers.per", fact, f"use {max(1, round(top.tokens / SUB_TILE)) * SUB_TILE}")


@rule("~.code", "~.scale", "~.transform", "~.outliers")
def _what_can_code_chosen_channels(site: Site) -> Iterator[Fault]:
    top, store = choice(site), site.store
    if top is None:
        return
    if store.rope is not None:
        fact = "channels of keys without RoPE would have to be turned back on their own"
        yield site.fault("outliers", fact, "leave it out, or leave out PreRope()")
    yield from nothing_left(site)
    match top.store.code:
        case Sketch():
            if not isinstance(store.code, Sketch):
                fact = "a sketch of chosen channels stands beside a sketch of the others"
                yield site.fault("outliers.store", fact, "use Store() to keep them in fp16, or a Sketch as the code")
        case Uniform():
            yield from _more_bits(site, store, top.store)
        case Float(format="fp16"):
            if top.store != Store():
                yield site.fault("outliers.store", "what is kept in fp16 is what the codes leave", "use Store()")
        case code:
            fact = f"{type(code).__name__} would need scales of its own for every choice"
            mend = "use Store() to keep them in fp16, Uniform of more bits, or a Sketch beside a Sketch"
            yield site.fault("outliers.store.code", fact, mend)


def _more_bits(site: Site, store: Store, top: Store) -> Iterator[Fault]:
    """The faults of codes whose lowest bits stand among those of the other channels."""
    code, others, scale = top.code, store.code, store.measure
    assert isinstance(code, Uniform)
    if not isinstance(others, Uniform) or others.levels or code.levels or others.bits is None or code.bits is None:
        fact = "its lowest bits stand among codes of whole bits, evenly spaced"
        yield site.fault("outliers.store.code", fact, "use Uniform(bits=2) for all, Uniform(bits=4) for these")
        return
    if code.bits - others.bits not in PLANES:
        fact = f"{code.bits} bits are not {' or '.join(map(str, PLANES))} more than {others.bits}"
        yield site.fault("outliers.store.code.bits", fact, f"use {others.bits + 2}")
    if (code.grid, code.rounding) != (others.grid, others.rounding):
        yield site.fault(
            "outliers.store.code", "codes of all channels are made alike", "use the same grid and rounding"
        )
    if top != Store(code, scale=store.scale):
        fact = "these channels are coded as the others are, with more bits"
        yield site.fault("outliers.store", fact, f"use {code!r} alone")
    if scale is None or scale.block.channels != 1 or scale.when != "online":
        yield site.fault("scale", "every channel has its own range, or more bits are of no use", "use per_channel()")
    elif scale.range not in ("minmax", "minmax_zero") or scale.zero_inside or scale.scale is not None:
        fact = "codes of more bits begin where the others do"
        yield site.fault("scale", fact, "use range='minmax' and zero='min', and one level of scales")
    elif isinstance(scale.block.tokens, int) and isinstance(top, Store):
        per = store.outliers.tokens  # type: ignore[union-attr]
        if per % scale.block.tokens:
            fact = f"{per} tokens are no whole number of groups of {scale.block.tokens}"
            yield site.fault("outliers.per", fact, f"use {scale.block.tokens}")
    if store.transform:
        yield site.fault("transform", "channels are ranked, and coded, as they are", "leave transform out")


def shape_faults(site: Site, shape: Shape) -> Iterator[Fault]:
    """Counts of channels that leave no others, or no outliers."""
    top = choice(site)
    if top is not None and not 1 <= top.count(shape.head_dim) < shape.head_dim:
        count = top.count(shape.head_dim)
        fact = f"{count} of {shape.head_dim} channels are {'none' if not count else 'all'}"
        yield site.fault("outliers.n", fact, f"use {max(1, shape.head_dim // 8)}")
