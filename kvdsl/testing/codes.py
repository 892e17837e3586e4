"""Laws of packed codes: which words are written, what they decode to, how far that is from what was given."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Generator, Tensor

from kvdsl import reference
from kvdsl.codes import width
from kvdsl.inputs import DTYPES
from kvdsl.kernels import Params, Side
from kvdsl.reference.alphabets import alphabet
from kvdsl.reference.quantize import encoded_rows, level_count, quantize
from kvdsl.scheme import SIDES, Codebook, Float, Scheme, Store, Uniform

from .bounds import LARGEST, blocks_of, bound, spread
from .cases import METADATA, Case, law, require, require_equal, require_within, static
from .driving import POISON, USUAL, Ends, Pages, Poison, new_pages, pack, packed, ready

Levels = tuple[Tensor, Tensor]
LEAST = {"fp16": -14, "bf16": -126, "fp32": -126, "e4m3": -6, "e5m2": -14, "e8m0": -126}  # exponents of normal numbers
TOPS = {"fp16": LARGEST, "e4m3": 448.0, "e5m2": 57344.0}  # where a format of numbers saturates


def _with_sinks(case: Case, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Poisoned sinks before the tokens that are packed: they may not count."""
    lead = torch.full((*k.shape[:2], case.sinks, k.shape[3]), torch.nan, dtype=k.dtype)
    return torch.cat([lead, k], 2), torch.cat([lead, v], 2)


def _pages(case: Case, k: Tensor, v: Tensor, params: Params, poison: Poison = USUAL) -> Pages:
    ends: Ends = {side: [k.shape[2]] * case.batch for side in SIDES}
    return packed(case.kernels, *_with_sinks(case, k, v), ends, params, poison)


def _decoded(case: Case, pages: Pages, begin: int, end: int, params: Params) -> tuple[Tensor, Tensor]:
    there = ready(case.kernels, params)
    keys, values = (case.kernels.unpack(side, pages.pool, pages.table, begin, end, there).cpu() for side in SIDES)
    return keys, values


def roundtrip(case: Case, k: Tensor, v: Tensor, params: Params) -> tuple[Tensor, Tensor]:
    """k and v through packed bytes: every token packed, and decoded."""
    return _decoded(case, _pages(case, k, v, params), 0, k.shape[2], params)


def _plain(store: Store) -> bool:
    """The numbers themselves are stored."""
    return isinstance(store.code, Float) and store.code.plain


def _bare(scheme: Scheme) -> bool:
    """Whether vectors are coded as they are on both sides."""
    return not (scheme.keys.turned or scheme.values.turned)


def _has_ends(store: Store) -> bool:
    """Whether numbers can be chosen so that the stored scale is 1: the range has ends that are levels, unclipped."""
    scale = store.measure
    if scale is None:
        return True
    known = not isinstance(store.code, Codebook) or isinstance(store.code.levels, tuple)
    if isinstance(store.code, Uniform) and store.code.grid == "cells" and scale.refit is not None:
        return False  # the numbers given are the cells' borders, not their levels
    return scale.clip == 1 and known and scale.range not in ("norm", "absmean")


def _has_codes(scheme: Scheme) -> bool:
    sides = (scheme.keys, scheme.values)
    return _bare(scheme) and all(map(_has_ends, sides)) and not all(map(_plain, sides))


# ---- which words


@law("P27")
def words_equal_the_reference(case: Case) -> None:
    """P27, P32: the words of packed tokens are those of the reference, bit for bit; no other byte is written."""
    tokens = case.whole
    k, v = case.pair(tokens)
    params = case.params(k, v)
    want = torch.from_numpy(reference.pages(case.scheme, case.shape, k, v, params))
    one, other = (
        _pages(case, k, v, params, Poison(word, seed=case.seed)).content() for word in (POISON, 0xFF ^ POISON)
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
    want = _pages(case, k, v, params)
    parts = new_pages(case.kernels, case.batch, tokens)
    for side, x in zip(SIDES, _with_sinks(case, k, v), strict=True):
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
    both = _with_sinks(case, k, v)
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
    pages = _pages(case, k, v, params, Poison(seed=case.seed))
    wanted = case.decoded(k, v, params)
    cut = case.random.randrange(0, case.whole)
    for begin, end in ((0, case.whole), (cut, case.random.randrange(cut, case.whole + 1))):
        for side, got, want in zip(SIDES, _decoded(case, pages, begin, end, params), wanted, strict=True):
            require_equal(f"decoded {side}", got, want[:, :, begin:end])


@law("P27", _has_codes)
def every_code_comes_back(case: Case) -> None:
    """P27: numbers that are levels of a step of one decode to themselves, so every code survives in every place."""
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
    if _plain(store):
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
    """The same of a table or a small float: levels that the dtype holds, and that which makes the scale 1."""
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
        return True
    fixed = scale.when == "calibrated"
    if not isinstance(code, Uniform):
        kept = scale.clip == 1 and scale.refit is None and scale.dtype != "e4m3" and _far_ends(store)
        return fixed or kept
    nearest = code.rounding != "floor" and code.grid == "ends" and scale.zero == "min"
    fits = {"fp16": 8, "bf16": 6, "fp32": 8, "e4m3": 3, "e8m0": 0}[scale.dtype] >= (width(code) or 0)
    return nearest and (fixed or (scale.clip == 1 and fits and scale.refit is None))


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


@law("P3", lambda s: _bare(s) and all(map(_keeps_its_ends, (s.keys, s.values))), ("normal", "outlier_channel", "ties"))
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


def _keeps_constants(store: Store) -> bool:
    """Whether a block of one number has a code for it."""
    scale = store.measure
    if scale is None:
        return True
    if scale.scale is not None or isinstance(store.code, Codebook) and store.code.levels == "calibrated":
        return False  # other numbers are read beside the block
    return scale.when == "online" and scale.clip == 1 and scale.range == "minmax" and scale.zero in ("min", "point")


@law("P4", lambda s: _bare(s) and _keeps_constants(s.keys) and _keeps_constants(s.values), ("constant",))
def a_constant_block_is_itself(case: Case) -> None:
    """P4: a block of one number decodes to that number, rounded as its metadata (or float code) is."""
    for value in (0.0, 1.0, -2.5, 65504.0, -65504.0, float(case.pair(1)[0].view(-1)[0])):
        k, v = (torch.full_like(x, value) for x in case.pair(case.whole))
        for side, x, got in zip(SIDES, (k, v), roundtrip(case, k, v, {}), strict=True):
            store = case.scheme.side(side)
            if store.measure is None:
                assert isinstance(store.code, Float)
                dtype, limit = METADATA[store.code.format], TOPS.get(store.code.format, float("inf"))
            else:
                dtype, limit = METADATA[store.measure.dtype], min(LARGEST, TOPS.get(store.measure.dtype, LARGEST))
            held = x.double().clamp(-limit, limit).float().to(dtype).double()
            require_equal(f"decoded {side}", got, held)


@law("P4", kinds=("normal", "outlier_channel"))
def a_nan_spoils_its_block_only(case: Case) -> None:
    """A NaN makes its own block NaN (a calibrated scale codes it as 0) and leaves every other number as it was; where
    vectors are mapped it stands in every number of its vector."""
    k, v = case.pair(case.whole)
    params = case.params(k, v)
    at = tuple(case.random.randrange(n) for n in k.shape)
    clean = roundtrip(case, k, v, params)
    for x in (k, v):
        x[at] = torch.nan
    for side, x, before, got in zip(SIDES, (k, v), clean, roundtrip(case, k, v, params), strict=True):
        store = case.scheme.side(side)
        coded = encoded_rows(store, x, params, side, case.sinks)
        bad = coded.isnan()
        if store.measure is not None and not static(store):
            hit = blocks_of(store, bad.double()).amax((2, 4, 6)) > 0
            bad = spread(store, hit.double(), coded) > 0
        if store.turned:
            bad = bad.any(-1, keepdim=True).expand(x.shape)
        require_equal(f"decoded {side}", got[~bad], before[~bad])
        if static(store):
            require_equal(f"decoded {side}", got[bad], quantize(store, x, params, side, case.sinks).decoded[bad])
        else:
            require(bool(got[bad].isnan().all()), f"decoded {side}: a number beside the NaN at {at} is {got[bad]}")


@law("P2", kinds=("normal", "huge"))
def infinity_saturates(case: Case) -> None:
    """Infinities are taken as +-65504 (as they are by Float("fp32")): it saturates and nothing becomes NaN."""
    k, v = case.pair(case.whole)
    params = case.params(k, v)
    at = tuple(case.random.randrange(n) for n in k.shape)
    for x in (k, v):
        x[at] = torch.inf if case.seed % 2 else -torch.inf
    wanted = case.decoded(k, v, params)
    for side, got, want in zip(SIDES, roundtrip(case, k, v, params), wanted, strict=True):
        require_equal(f"decoded {side}", got, want)
        store = case.scheme.side(side)
        if not (isinstance(store.code, Float) and store.code.format == "fp32"):
            require(bool(got.isfinite().all()), f"decoded {side}: not finite")
