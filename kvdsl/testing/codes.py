"""Laws of packed codes: which words are written, what they decode to, how far that is from what was given."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Generator, Tensor

from kvdsl import reference
from kvdsl.codes import width
from kvdsl.inputs import DTYPES
from kvdsl.kernels import Side
from kvdsl.reference.alphabets import alphabet
from kvdsl.reference.quantize import level_count, quantize
from kvdsl.scheme import SIDES, Codebook, Float, LowRank, Scheme, Store, Uniform, Vectors

from .bounds import blocks_of, bound, spread
from .cases import Case, law, require, require_equal, require_within, static
from .driving import POISON, Ends, Poison, new_pages, pack, packed
from .trips import bare, decoded, pages_of, plain, roundtrip, with_sinks

Levels = tuple[Tensor, Tensor]


def _has_ends(store: Store) -> bool:
    """Whether numbers can be chosen so that the stored scale is 1: it is given, or the range has ends that are levels,
    unclipped."""
    scale = store.measure
    if scale is None:
        return not isinstance(store.code, (LowRank, Vectors))
    known = not isinstance(store.code, Codebook) or isinstance(store.code.levels, tuple)
    if static(store):
        return known
    if isinstance(store.code, Uniform) and store.code.grid == "cells" and scale.refit is not None:
        return False  # the numbers given are the cells' borders, not their levels
    return scale.whole and known and scale.range not in ("norm", "absmean")


def _single(scheme: Scheme) -> bool:
    """Whether one store has all of a vector."""
    return len(scheme.keys.placed("")) == len(scheme.values.placed("")) == 1


def _has_codes(scheme: Scheme) -> bool:
    sides = (scheme.keys, scheme.values)
    return bare(scheme) and _single(scheme) and all(map(_has_ends, sides)) and not all(map(plain, sides))


# ---- which words


@law("P27")
def words_equal_the_reference(case: Case) -> None:
    """P27, P32: the words of packed tokens are those of the reference, bit for bit; no other byte is written."""
    tokens = case.whole
    k, v = case.pair(tokens)
    params = case.params(k, v)
    want = torch.from_numpy(reference.pages(case.scheme, case.shape, k, v, params))
    one, other = (
        pages_of(case, k, v, params, Poison(word, seed=case.seed)).content() for word in (POISON, 0xFF ^ POISON)
    )
    written = one == other
    require_equal("bytes", torch.where(written, one, 0), torch.where(written, want, 0))
    require_equal("bytes that nobody wrote", torch.where(written, POISON, one), torch.full_like(one, POISON))
    require(not bool(want[~written].any()), "a byte that holds something was not written")


@law("P28")
def packing_in_parts_gives_the_same_words(case: Case) -> None:
    """P28: packed in parts, in any order of cuts at whole blocks, the words are those of packing at once."""
    tokens = case.whole
    k, v = case.pair(tokens)
    params = case.params(k, v)
    want = pages_of(case, k, v, params)
    parts = new_pages(case.kernels, case.batch, tokens)
    for side, x in zip(SIDES, with_sinks(case, k, v), strict=True):
        cuts = sorted({case.random.randrange(0, tokens + 1) // case.block * case.block for _ in range(3)} | {0, tokens})
        for begin, end in zip(cuts, cuts[1:], strict=False):
            pack(case.kernels, side, x, [begin] * case.batch, [end] * case.batch, parts, params, Poison(seed=begin))
    require_equal("bytes", parts.content(), want.content())


@law("P29")
def neighbours_do_not_reach_the_words(case: Case) -> None:
    """P29: packed in a ragged batch, a sequence has the words it has alone, whatever stands beside and behind it."""
    k, v = case.pair(case.whole)
    params = case.params(k, v)
    counts = [case.random.randrange(0, case.whole // case.block + 1) * case.block for _ in range(case.batch)]
    both = with_sinks(case, k, v)
    ends: Ends = {side: counts for side in SIDES}
    for b, count in enumerate(counts):
        for x in both:
            x[b, :, case.sinks + count :] = torch.nan
    together = packed(case.kernels, *both, ends, params, Poison(seed=case.seed), room=case.whole).content()
    for b, count in enumerate(counts):
        own: Ends = {side: [count] for side in SIDES}
        k, v = (x[b : b + 1] for x in both)
        alone = packed(case.kernels, k, v, own, params, room=case.whole)
        require_equal(f"bytes of sequence {b}", together[b : b + 1], alone.content())


# ---- what they decode to


@law("P32")
def decoding_equals_the_reference(case: Case) -> None:
    """P32: unpack gives the reference's decoded numbers to the last bit, of any range of tokens."""
    k, v = case.pair(case.whole)
    params = case.params(k, v)
    pages = pages_of(case, k, v, params, Poison(seed=case.seed))
    wanted = case.decoded(k, v, params)
    cut = case.random.randrange(0, case.whole)
    for begin, end in ((0, case.whole), (cut, case.random.randrange(cut, case.whole + 1))):
        for side, got, want in zip(SIDES, decoded(case, pages, begin, end, params), wanted, strict=True):
            require_equal(f"decoded {side}", got, want[:, :, begin:end])


@law("P27", _has_codes)
def every_code_comes_back(case: Case) -> None:
    """P27: numbers that are levels of a step of one decode to themselves, so every code survives in every place.
    Levels of tables are float32 numbers, which other dtypes need not hold."""
    if any(isinstance(case.scheme.side(side).code, Codebook) for side in SIDES):
        case = replace(case, shape=replace(case.shape, dtype="fp32"))
    given = {side: _levels(case, side) for side in SIDES}
    params = _units(case)
    (k, keys), (v, values) = given["keys"], given["values"]
    for side, got, want in zip(SIDES, roundtrip(case, k, v, params), (keys, values), strict=True):
        require_equal(f"decoded {side}", got, want)


def _levels(case: Case, side: Side) -> tuple[Tensor, Tensor]:
    """Numbers (B, H, T, D) on random levels of a step of one, both ends of the range in every block; what they decode
    to."""
    store = case.scheme.side(side)
    generator = torch.Generator().manual_seed(case.seed)
    size = (case.batch, case.shape.kv_heads, case.whole, case.shape.head_dim)
    dtype = DTYPES[case.shape.dtype]
    if plain(store):
        integers = torch.randint(-256, 257, size, generator=generator).to(dtype)
        return integers, integers.double()
    if not isinstance(store.code, Uniform):
        return _listed_levels(store, size, generator, dtype)
    assert store.measure is not None
    levels, cells = level_count(store), store.code.grid == "cells"
    middle = levels // 2 if cells or store.measure.range == "signed_absmax" else (levels - 1) // 2
    if store.measure.range in ("absmax", "signed_absmax"):
        lowest, most = -middle, 2 * middle if store.measure.range == "absmax" and not cells else levels - 1
    else:
        lowest, most = 0, levels if cells else levels - 1
    codes = _with_ends(store, torch.randint(0, most + 1, size, generator=generator), 0, most, generator)
    return (codes + lowest).to(dtype), codes.clamp(max=levels - 1).double() + lowest + (0.5 if cells else 0.0)


def _listed_levels(store: Store, size: tuple[int, ...], generator: Generator, dtype: torch.dtype) -> Levels:
    """The same of a table or a small float: levels that the range reaches, and that which makes the scale 1."""
    scale = store.measure
    channels = scale.block.channels if scale is not None and isinstance(scale.block.channels, int) else size[3]
    letters = alphabet(store, channels, None)
    none = torch.zeros((), dtype=torch.float64)
    every = letters.level(torch.arange(letters.count, dtype=torch.float64), none)
    every = every[every.isfinite() & (every.to(dtype).double() == every)].unique()
    ranged = scale is not None and scale.range in ("minmax", "minmax_zero")
    ends = (-1.0, 1.0) if ranged else (letters.lowest, letters.lowest)
    if scale is not None and scale.range == "absmax":
        ends = (letters.top, letters.top) if (every == letters.top).any() else (-letters.top, -letters.top)
    every = every[(every >= -1) & (every <= 1)] if ranged else every
    if scale is not None and scale.range == "signed_absmax":
        every = every[every.abs() <= abs(letters.lowest)]
        every = every[every != -letters.lowest]
    if not len(every):
        every = torch.tensor(ends[:1], dtype=torch.float64)
    numbers = every[torch.randint(0, len(every), size, generator=generator)]
    if scale is not None:
        numbers = _with_ends(store, numbers, *ends, generator)
    numbers = numbers.to(dtype)
    return numbers, letters.level(letters.encode(numbers.double(), none), none)


def _with_ends(store: Store, numbers: Tensor, low: float, high: float, generator: Generator) -> Tensor:
    """Numbers (B, H, T, D) with two of every block replaced."""
    blocks = blocks_of(store, numbers).permute(0, 1, 3, 5, 2, 4, 6)
    rows = blocks.reshape(blocks.shape[:4].numel(), -1).clone()
    places = torch.rand(rows.shape, generator=generator).argsort(1)
    rows.scatter_(1, places[:, :1], low).scatter_(1, places[:, 1:2], high)
    return rows.reshape(blocks.shape).permute(0, 1, 4, 2, 5, 3, 6).reshape(numbers.shape)


def _units(case: Case) -> dict[str, Tensor]:
    """Calibrated parameters with a step of one and an offset of 0."""
    params = case.params(*case.pair(1 if case.block == 1 else case.whole))
    for name, tensor in params.items():
        if name.endswith(".code"):
            continue
        params[name] = torch.ones_like(tensor)
        if tensor.dim() == 3:
            params[name][1] = 0
    return params


# ---- how far that is from what was given


@law("P1")
def errors_stay_within_the_bound(case: Case) -> None:
    """P1, P2: no decoded number is farther from its original than the bound derived in `bounds`."""
    k, v = case.pair(case.whole)
    params = case.params(k, v)
    for side, x, got in zip(SIDES, (k, v), roundtrip(case, k, v, params), strict=True):
        require_within(f"decoded {side}", got, x, bound(case.scheme.side(side), x, params, side, case.sinks))


def _keeps_its_ends(store: Store) -> bool:
    """Whether coding what was decoded finds the same range again: nearest levels, both ends of an unclipped range."""
    scale, code = store.measure, store.code
    if scale is None:
        return not isinstance(code, LowRank)
    fixed = scale.when == "calibrated"
    if isinstance(code, Codebook) and code.match is not None:
        return False  # a decoded level may be nearer to another one that numbers are compared with
    if not isinstance(code, Uniform):
        kept = scale.whole and scale.refit is None and scale.dtype != "e4m3" and _far_ends(store)
        return fixed or kept
    nearest = code.rounding != "floor" and code.grid == "ends" and scale.zero == "min"
    small = 2 if scale.range in ("minmax", "minmax_zero") else 3  # an offset is rounded beside the scale
    fits = {"fp16": 8, "bf16": 6, "fp32": 8, "e4m3": small, "e8m0": 0}[scale.dtype] >= (width(code) or 0)
    return nearest and (fixed or (scale.whole and fits and scale.refit is None))


def _far_ends(store: Store) -> bool:
    """Whether the largest number is decoded to the end of the levels, and nothing farther out."""
    assert store.measure is not None
    range_, code = store.measure.range, store.code
    if isinstance(code, Float):
        return range_ == "absmax"
    if not isinstance(code, Codebook) or not isinstance(code.levels, tuple):
        return False
    low, high = code.levels[0], code.levels[-1]
    if store.measure.dtype == "e8m0":
        return False
    return low == -high if range_ == "absmax" else range_ == "signed_absmax" and -low > abs(high)


@law(
    "P3",
    lambda s: bare(s) and _single(s) and all(map(_keeps_its_ends, (s.keys, s.values))),
    ("normal", "outlier_channel", "ties"),
)
def a_second_time_changes_no_code(case: Case) -> None:
    """P3: what was decoded is coded by the same codes again, where the ends of the range are levels.

    The two decoded numbers then differ by what rounding the scale a second time may do: less than a quarter step.
    """
    case = replace(case, shape=replace(case.shape, dtype="fp32"))
    k, v = case.pair(case.whole)
    params = case.params(k, v)
    once = roundtrip(case, k, v, params)
    for side, first, second in zip(SIDES, once, roundtrip(case, *once, params), strict=True):
        store = case.scheme.side(side)
        if store.measure is None:
            require_equal(f"decoded {side}", second, first)
            continue
        scale = quantize(store, first, params, side).scale
        assert scale is not None
        limit = spread(store, scale.abs(), first) / 4 + 1e-30
        if not isinstance(store.code, Uniform):  # levels are not a step apart, but a scale comes back to the last bit
            limit = first.abs() * 2.0**-22
        require_within(f"decoded {side}", second, first, limit)
