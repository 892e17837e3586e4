"""Random schemes of the language, legal by construction, the shapes they fit, and schemes with exactly one mistake."""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Callable
from typing import Any, get_args

from hypothesis import strategies as st

from kvdsl.codes import SLOT_TOKENS, FloatRounding, in_trits
from kvdsl.rules import shape_faults
from kvdsl.scale import Exponent
from kvdsl.scheme import (
    ALL,
    Balance,
    Bands,
    Block,
    ChannelScale,
    ChannelShift,
    Codebook,
    Count,
    Eigenbasis,
    Float,
    LowRank,
    Permute,
    Polar,
    PreRope,
    Recent,
    Rotate,
    Scale,
    Scheme,
    Sinks,
    Sketch,
    Sparse,
    Store,
    TopChannels,
    Transform,
    Uniform,
    per_channel,
    per_token,
)
from kvdsl.shape import Shape
from kvdsl.window import waiting, windows

from .additive import OF_VECTORS, of_vectors
from .cases import Case
from .data import KINDS
from .outliers import chosen, sparse
from .rounded import queries

Draw = Callable[..., Any]


def schemes(*, longest: int = 64) -> st.SearchStrategy[Scheme]:
    """Legal schemes without layers.  `longest`: the most tokens that share a scale or wait in a window."""
    return _schemes(longest)


@st.composite
def _schemes(draw: Draw, longest: int) -> Scheme:
    keys = draw(stores(longest))
    values = draw(st.one_of(st.just(keys), stores(longest)))
    plain = keys.residual is None and not keys.polar and not isinstance(keys.outliers, TopChannels)
    plain = plain and not isinstance(keys.code, (LowRank, Sketch, *(OF_VECTORS * bool(keys.transform))))
    if plain and draw(st.integers(0, 4)) == 4:
        own = (Eigenbasis("own", per=part.per) if isinstance(part, Eigenbasis) else part for part in keys.transform)
        keys = keys.with_(transform=(PreRope(draw(st.booleans())), *own))
    alone = isinstance(keys.code, OF_VECTORS) or keys.outliers is not None
    if longest >= 32 and not alone and draw(st.integers(0, 7)) == 7:
        keys = keys.with_(outliers=draw(chosen(keys)))
    if longest >= 32 and draw(st.integers(0, 11)) == 11:
        keys, values = draw(balanced(per_channel(tokens=32))), draw(balanced(per_token()))
    group = math.lcm(_tokens(keys), _tokens(values))
    sinks = draw(st.sampled_from([None, None, Sinks(1), Sinks(4), Sinks(5)]))
    if group > 1:
        most = max(1, longest // group)
        recent = Recent(group * draw(st.integers(1, most)), draw(st.sampled_from(["auto", "whole"])))
    else:
        flush = st.sampled_from(["auto", "rolling", "whole"])
        recent = draw(st.one_of(st.none(), st.builds(Recent, st.integers(1, longest), flush)))
    keys, values = (_shortened(store) if _may_be_short(store) and draw(st.booleans()) else store
                    for store in (keys, values))  # fmt: skip
    prefill = draw(st.sampled_from(["exact", "exact", "stored"]))
    if not _legal_widths(Scheme(keys=keys, values=values, recent=recent), 128):
        keys, values = keys.with_(outliers=None), values.with_(outliers=None)
    return Scheme(keys=keys, values=values, sinks=sinks, recent=recent, prefill=prefill, queries=draw(queries(keys)))


def _may_be_short(store: Store) -> bool:
    """Whether the last map is a basis, which may keep its first numbers alone."""
    last, block = store.transform[-1:], store.scale.block if store.scale is not None else Block()  # type: ignore
    alone = store.joined == 1 and not isinstance(store.outliers, Sparse)
    return bool(last) and isinstance(last[0], Eigenbasis) and alone and block.channels in (1, ALL)


def _shortened(store: Store) -> Store:
    """The store whose last map, a basis, keeps 16 numbers."""
    *others, basis = store.transform  # type: ignore[misc]
    return dc.replace(store, transform=(*others, dc.replace(basis, rank=16)))


def _legal_widths(scheme: Scheme, widest: int) -> list[int]:
    """The head_dims up to `widest` that a scheme fits."""
    heads = _heads(scheme)
    return [width for width in range(32, widest + 1, 8) if not shape_faults(scheme, Shape(width, heads))]


def _heads(scheme: Scheme) -> int:
    """The fewest kv heads that a scheme fits."""
    stores = (*scheme.keys.terms, *scheme.side("values").terms)
    blocks = [store.measure.block for store in stores if store.measure is not None]
    rotations = [part for store in stores for _, part in store.walk() if isinstance(part, Rotate)]
    return math.lcm(*(block.heads for block in blocks if isinstance(block.heads, int)), *(r.heads for r in rotations))


def _tokens(side: Store) -> int:
    """Tokens that wait for one another on a side."""
    return math.lcm(*map(waiting, side.terms))


@st.composite
def stores(draw: Draw, longest: int) -> Store:
    """A legal store; one in six also codes what it leaves, one in six has outlier channels, one in twelve single
    numbers that are kept as they are."""
    store: Store = draw(_single(longest))
    if draw(st.integers(0, 5)) == 5 and _parts(store):
        top: Store = draw(_single(longest))
        if _parts(top) and _measured_online(top, plain=True):
            store = store.with_(outliers=TopChannels(draw(st.sampled_from([8, 32, 0.25, 0.5])), store=top))
    whole = isinstance(store.code, (Bands, *OF_VECTORS)) or isinstance(store.code, Float) and store.code.plain
    if store.outliers is None and not whole and longest >= SLOT_TOKENS and draw(st.integers(0, 11)) == 11:
        store = store.with_(outliers=draw(sparse()))
    if whole or draw(st.integers(0, 5)) < 5:
        return store
    rest: Store = draw(_single(longest))
    if draw(st.integers(0, 2)) == 2:
        rest = Store(draw(_low_rank(longest)))
    return store.with_(residual=rest if _measured_online(rest) else Store(Sketch(64, "gaussian")))


def balanced(scale: Scale) -> st.SearchStrategy[Store]:
    """Even levels under this scale, of tiles of 32 tokens that have factors along the other axis."""
    turned = st.sampled_from([(), (Rotate("hadamard", 32),)])
    tiles = st.builds(Balance, st.just(32), loops=st.integers(1, 3), unit=st.sampled_from([None, "rms"]))
    codes = st.builds(Uniform, st.integers(1, 8))
    return st.builds(lambda c, maps, last: Store(c, scale=scale, transform=(*maps, last)), codes, turned, tiles)


def _low_rank(longest: int) -> st.SearchStrategy[LowRank]:
    """Vectors of low rank of blocks of up to `longest` tokens."""
    blocks = [tokens for tokens in (32, 64, 96) if tokens <= longest]
    return st.builds(LowRank, st.integers(1, 6), tokens=st.sampled_from(blocks), loops=st.integers(1, 4))


def _parts(store: Store) -> bool:
    """Whether the store may be of some channels of a head."""
    return not isinstance(store.code, (Bands, LowRank, Sketch, *OF_VECTORS)) and store.joined == 1


def _measured_online(store: Store, *, plain: bool = False) -> bool:
    """Whether the store may be of what another one left; `plain`: of outlier channels, which may be exact."""
    if isinstance(store.code, (Bands, *OF_VECTORS)) or isinstance(store.code, Float) and store.code.plain and not plain:
        return False
    given = [part for _, part in store.walk() if getattr(part, "when", None) == "calibrated"]
    return not given and not (isinstance(store.code, Codebook) and store.code.levels == "calibrated")


@st.composite
def _single(draw: Draw, longest: int) -> Store:
    """A legal store: one float in eight, else a sketch, vectors, or levels, even, of a table or a small float, under a
    scale."""
    kind = draw(st.sampled_from(["float", "sketch", "low rank", "table", "small", "small", *["uniform"] * 5]))
    if kind == "low rank":
        if draw(st.booleans()):
            return Store(draw(_low_rank(longest)))
        return draw(of_vectors())
    if kind == "float":
        number = Float(draw(st.sampled_from(["fp16", "fp32", "e4m3", "e5m2"])))
        return draw(_in_polar(Store(number, transform=draw(transforms()))))
    if kind == "sketch":
        basis = draw(st.sampled_from(["orthogonal", "gaussian"]))
        return Store(Sketch(draw(st.sampled_from([8, 24, 64, 136, ALL])), basis, draw(st.integers(0, 3))))
    code: Uniform | Float | Codebook
    if kind == "table":
        code, ranges = draw(_tables())
    elif kind == "small":
        small, ties = st.sampled_from(["e4m3", "e5m2", "e2m1", "e2m1"]), st.sampled_from(get_args(FloatRounding))
        code, ranges = Float(draw(small), rounding=draw(ties)), ["absmax", "absmax", "norm"]
    else:
        code, ranges = draw(_uniforms())
    scale = draw(_scales(code, draw(st.sampled_from(ranges)), longest))
    return draw(_in_polar(Store(code, scale=scale, transform=draw(transforms()))))


@st.composite
def _in_polar(draw: Draw, store: Store) -> Store:
    """The store, in polar coordinates now and then where they suit its code and its scale, one in four of bands."""
    scale = store.scale
    single = scale is None or scale.scale is None and isinstance(scale.block.channels, int)
    if not single or in_trits(store.code) or draw(st.integers(0, 2)) < 2:
        return store
    if draw(st.integers(0, 3)) == 3 and store.joined == 1:
        return draw(_in_bands(store.transform))
    return store.with_(transform=(*store.transform, Polar()))  # type: ignore[misc]


@st.composite
def _in_bands(draw: Draw, transform: Any) -> Store:
    """Radii, and angles of one to three levels."""
    radii = [Store(Float("fp16")), Store(Float("fp32")), Store(Uniform(8), scale=per_token())]
    radii.append(Store(Uniform(4), scale=per_channel(tokens=32)))
    tables = st.builds(lambda bits: Store(Codebook(bits, "angle")), st.integers(1, 4))
    evenly = st.builds(
        lambda bits, size: Store(Uniform(bits, grid="cells"), scale=Scale(Block(size))),
        st.integers(2, 8), st.sampled_from([1, 32]),
    )  # fmt: skip
    angles = draw(st.lists(st.one_of(tables, tables, evenly), min_size=1, max_size=3))
    return Store(Bands((draw(st.sampled_from(radii)), *angles)), transform=(*transform, Polar(len(angles))))


@st.composite
def transforms(draw: Draw) -> tuple[Transform, ...]:
    """No map of the vector three times in four, else one or two."""
    one = st.one_of(
        st.builds(Rotate, st.just("hadamard"), st.sampled_from([8, 16, 32])),
        st.builds(Rotate, st.just("random_hadamard"), st.sampled_from([8, 32]), seed=st.integers(0, 3)),
        st.builds(Rotate, st.just("orthogonal"), st.sampled_from([8, ALL, (0.25, 0.75)]), seed=st.integers(0, 3)),
        st.builds(Rotate, st.sampled_from(["random_hadamard", "orthogonal"]), heads=st.just(2), seed=st.integers(0, 3)),
        st.builds(ChannelScale, st.sampled_from(["absmax", "sqrt_absmax", "learned"])),
        st.builds(ChannelShift, st.sampled_from(["mean", "middle"])),
        st.builds(Rotate, st.just("bit_reversal"), st.sampled_from([8, 32])),
        st.builds(Eigenbasis, st.sampled_from(["own", "balanced"]), per=st.sampled_from(["head", "layer"])),
        st.builds(Permute, st.sampled_from(["range", "sum"])),
    )
    if draw(st.integers(0, 3)) < 3:
        return ()
    return tuple(draw(st.lists(one, min_size=1, max_size=2)))


@st.composite
def _uniforms(draw: Draw) -> tuple[Uniform, list[str]]:
    range_ = draw(st.sampled_from(["minmax", "minmax", "minmax_zero", "absmax", "signed_absmax"]))
    grid = "ends" if range_ == "signed_absmax" else draw(st.sampled_from(["ends", "ends", "cells"]))
    centred = range_ == "absmax" and grid == "ends"
    even = range_ == "signed_absmax" or (range_ == "absmax" and grid == "cells")
    bits = draw(st.integers(2 if centred else 1, 8))
    levels = None
    if draw(st.integers(0, 3)) == 3:
        levels = draw(st.integers(3 if centred else 2, 2**bits))
        levels -= levels % 2 if even else 0
    digits = levels == 3 and draw(st.booleans())  # stored five in a byte
    rounding = "even" if grid == "cells" else draw(st.sampled_from(["even", "half_up", "away", "floor"]))
    code = Uniform(None if digits else bits, levels=levels, grid=grid, rounding=rounding)  # type: ignore[arg-type]
    return code, [range_]


IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
TABLES: tuple[tuple[float, ...], ...] = (
    (-1, 0, 1), (-1, 1), (-1.0, -0.3, 0.25, 1.0), (-0.9, 0.4), (-2, -1, -0.5, 0.25, 1), IQ4, (0.125, 0.5, 1),
)  # fmt: skip


@st.composite
def _tables(draw: Draw) -> tuple[Codebook, list[str]]:
    levels = draw(st.sampled_from(["normal", "normal", "beta", "beta", "calibrated", *TABLES]))
    if isinstance(levels, tuple):
        least = max(1, (len(levels) - 1).bit_length())
        bits = draw(st.sampled_from([None, least, min(4, least + 1)]))
        ranges = ["absmax", "signed_absmax", "norm", "absmean", *(["minmax", "minmax_zero"] if levels[0] >= -2 else [])]
        return Codebook(bits, levels), ranges
    ranges = ["norm", "norm", "absmean", "absmax"] + (["minmax"] * 2 if levels == "calibrated" else [])
    fitted = levels == "calibrated"
    weights, match = (draw(st.sampled_from([None, word])) if fitted else None for word in ("fisher", "moments"))
    return Codebook(draw(st.integers(1, 4)), levels, weights=weights, match=match), ranges


@st.composite
def _scales(draw: Draw, code: Any, range_: str, longest: int) -> Scale:
    """A scale that suits a code under a range."""
    uniform, given = isinstance(code, Uniform), isinstance(code, Codebook) and code.levels == "calibrated"
    offset = range_ in ("minmax", "minmax_zero")
    when = draw(st.sampled_from(["online"] * 5 + ["calibrated"]))
    online = when == "online"
    formats = ["fp16", "fp16", "bf16", "fp32", "e4m3", *(["e8m0"] if range_ == "absmax" and not given else [])]
    dtype, zero = draw(st.sampled_from(formats)), "min"
    if online and uniform and code.grid == "ends" and offset:
        pointed = dtype != "e4m3" and code.rounding != "floor"
        inside = ["in_scale", "held_in_scale"] if dtype == "fp32" else []
        zeros = ["min", "min", *(["point"] if pointed else []), *inside]
        zero = draw(st.sampled_from(zeros))
    block = draw(_blocks(longest, not online))
    if isinstance(code, Codebook) and code.levels == "beta" and block.channels == 1:
        block = dc.replace(block, channels=8)
    wide = [] if offset else [1.4, 2.0]
    clips: list[Any] = [1.0, 1.0, 1.0, 0.9, 0.5, *wide]
    if online:
        clips.append((1.0, 0.8) if offset else (1.0, 1.5))
    refit, second = None, None
    if online and not offset and dtype != "e8m0" and not (isinstance(code, Codebook) and code.match is not None):
        refits = [None, None, None, "least_squares", "weighted_least_squares", "unit_gain"]
        refit = draw(st.sampled_from(refits if range_ == "signed_absmax" else [*refits, "norm"]))
    if online and zero == "min" and dtype != "e8m0" and draw(st.integers(0, 3)) == 3:
        heads = draw(st.sampled_from([1, ALL])) if block.heads == 1 else ALL
        second = Scale(Block(ALL, ALL, heads), dtype="fp32", when="calibrated")
    ends = range_ not in ("norm", "absmean") and block.channels in (1, ALL) and block.heads == 1
    quantile = draw(st.sampled_from([None] * 9 + [0.9])) if ends else None
    sized = online and range_ in ("absmax", "minmax") and zero == "min" and dtype != "e8m0" and refit is None
    return Scale(
        block, range=range_, clip=draw(st.sampled_from(clips)), quantile=quantile, zero=zero, refit=refit, dtype=dtype,  # type: ignore[arg-type]
        exponent=draw(st.sampled_from(get_args(Exponent) if online and dtype == "e8m0" else ("floor",))),
        floor=draw(st.sampled_from([0.0] * 5 + [0.25 * sized])), scale=second, when=when,
    )  # fmt: skip


@st.composite
def _blocks(draw: Draw, longest: int, calibrated: bool) -> Block:
    heads: Count = draw(st.sampled_from([1, 1, 1, ALL] if calibrated else [1, 1, 1, 1, 2, ALL]))
    tokens: Count = ALL
    if not calibrated:
        tokens = draw(st.sampled_from([1, 1, 1, *(n for n in (2, 4, 8, 16, 24, 32, 64) if n <= longest)]))
    groups: list[Count] = [8, 16, 32, ALL, ALL]
    if tokens != 1:
        groups = [1, *groups]
    return Block(tokens, ALL if heads != 1 else draw(st.sampled_from(groups)), heads)


def shapes(scheme: Scheme, *, widest: int = 128) -> st.SearchStrategy[Shape]:
    """Shapes that the scheme fits: every legal head_dim up to `widest`, up to four kv heads, every dtype; of one with
    tiers, with and without a sliding window."""
    heads, widths = _heads(scheme), _legal_widths(scheme, widest) or _legal_widths(scheme, 256)[:1]
    usual = [d for d in widths if d in (32, 64, 80, 96, 112, 128)] or widths
    return st.builds(
        lambda width, factor, group, dtype, softcap, placed: Shape(
            width, factor * heads, factor * heads * group, dtype, softcap, placed
        ),
        st.one_of(st.sampled_from(usual), st.sampled_from(widths)),
        st.integers(1, 2),
        st.sampled_from([1, 2, 3, 5, 8, 16]),
        st.sampled_from(["fp16", "fp16", "bf16", "fp32"]),
        st.sampled_from([False, False, True]),
        st.sampled_from([False, False, True]) if scheme.routed else st.just(False),
    )


def cases(
    scheme: Scheme, shape: Shape, backend: Any = None, *, kinds: tuple[str, ...] = (), most: int = 0, batch: int = 3
) -> st.SearchStrategy[Case]:
    """Cases of a scheme at a shape: token counts at and beside the borders of words, pages, blocks and windows."""
    policies = windows(scheme).values()
    page = math.lcm(64, *(policy.block for policy in policies))
    sinks, window = (max(getattr(policy, name) for policy in policies) for name in ("sinks", "recent"))
    limit = most or sinks + window + page + 40
    borders = {1, 2, 32, 64, page, sinks, window, sinks + window, sinks + page, sinks + window + page}
    near = sorted({n + i for n in borders for i in (-1, 0, 1) if 1 <= n + i <= limit})
    return st.builds(
        Case,
        st.just(scheme),
        st.just(shape),
        st.just(backend),
        st.integers(1, batch),
        st.one_of(st.sampled_from(near), st.integers(1, limit)),
        st.sampled_from(kinds or tuple(KINDS)),
        st.integers(0, 2**16),
    )
