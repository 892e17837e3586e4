"""Laws of numbers that are special: constants, NaN, infinities, and all numbers times a power of two."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvdsl.codes import Code, coupled
from kvdsl.reference.quantize import encoded_rows, quantize
from kvdsl.scheme import (
    SIDES,
    Balance,
    ChannelShift,
    Chosen,
    Codebook,
    Float,
    LowRank,
    Parted,
    Scale,
    Scheme,
    Sketch,
    Sparse,
    Store,
    TopChannels,
    Uniform,
    Vectors,
)

from . import balanced, low_rank, sparse, splits
from .bounds import blocks_of, spread
from .cases import METADATA, Case, law, require, require_equal, static
from .formats import FORMATS, LARGEST
from .terms import Stretch, TermOf, pieces, stretches, terms_of
from .trips import bare, roundtrip

LEAST = {"fp16": -14, "bf16": -126, "fp32": -126, "e4m3": -6, "e5m2": -14, "e8m0": -126}  # exponents of normal numbers
TOPS = {"fp16": LARGEST, "e4m3": 448.0, "e5m2": 57344.0}  # where a format of numbers saturates


def _keeps_constants(store: Store) -> bool:
    """Whether a block of one number has a code for it."""
    scale = store.measure
    if len(store.placed("")) > 1 or isinstance(store.code, (LowRank, Vectors)):
        return False  # a second number for the block, or another one
    if scale is None:
        return True
    if scale.scale is not None or isinstance(store.code, Codebook) and store.code.levels == "calibrated":
        return False  # other numbers are read beside the block
    if scale.floor and not _has_zero(store.code):
        return False  # there is a least scale, and every level of it lies beside the number
    return scale.when == "online" and scale.whole and scale.range == "minmax" and scale.zero in ("min", "point")


def _has_zero(code: Code) -> bool:
    """Whether one of a code's levels is known to be 0."""
    if isinstance(code, Uniform):
        return code.grid != "cells"  # whose levels are middles
    if isinstance(code, Codebook):
        return isinstance(code.levels, tuple) and 0 in code.levels
    return isinstance(code, Float)


@law("P4", lambda s: bare(s) and _keeps_constants(s.keys) and _keeps_constants(s.values), ("constant",))
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
    """A NaN makes its own block NaN (a calibrated scale, or a table of vectors, codes it as 0) and leaves every other
    number as it was; where vectors are mapped it stands in every number of its vector, and it is none of the largest
    numbers of a line, or of a channel."""
    k, v = case.pair(case.whole)
    params = case.params(k, v)
    at = tuple(case.random.randrange(n) for n in k.shape)
    clean = roundtrip(case, k, v, params)
    _put(at, torch.nan, k, v)
    for side, x, before, got in zip(SIDES, (k, v), clean, roundtrip(case, k, v, params), strict=True):
        store, bad = case.scheme.side(side), torch.zeros(x.shape, dtype=torch.bool)
        other = bad | sparse.moved(x, store.outliers, side) if isinstance(store.outliers, Sparse) else bad
        other = other | splits.moved(x, store) if isinstance(store.outliers, TopChannels) else other
        other = other | balanced.moved(x, store)
        for term in terms_of(store, x, params, side, case.sinks):
            mine = torch.ones_like(bad) if term.mine is None else term.mine
            bad = bad | mine & _spoilt(term, term.x)
            other = other | _spoilt(term, torch.where(other, torch.nan, term.x))
        if store.rope is not None:  # positions mix the numbers of a pair again
            bad, other = (found.any(-1, keepdim=True).expand(x.shape) for found in (bad, other))
        require_equal(f"decoded {side}", got[~(bad | other)], before[~(bad | other)])
        if static(store) or isinstance(store.code, Vectors):
            require_equal(f"decoded {side}", got[bad], quantize(store, x, params, side, case.sinks).decoded[bad])
        else:
            require(bool(got[bad].isnan().all()), f"decoded {side}: a number beside the NaN at {at} is {got[bad]}")


def _put(at: tuple[int, ...], number: float, *tensors: Tensor) -> None:
    """A number in place of another one; shared values do not have all channels of the keys."""
    for x in tensors:
        if at[3] < x.shape[3]:
            x[at] = number


def _spoilt(term: TermOf, x: Tensor) -> Tensor:
    """Which numbers of x (B, H, T, D) share a number that a term stores with a NaN of it."""
    store, found = term.store, []
    for part, numbers, _ in stretches(store, encoded_rows(store, x, term.params, term.place)):
        bad = numbers.isnan()
        if isinstance(part.code, LowRank):
            bad = low_rank.any_in_block(bad, part.code)
        if (size := coupled(part.code)) > 1:
            bad = bad.unflatten(-1, (-1, size)).any(-1).repeat_interleave(size, -1)
        if part.measure is not None and not static(part):
            hit = blocks_of(part, bad.double()).amax((2, 4, 6)) > 0
            bad = spread(part, hit.double(), numbers) > 0
        found.append(bad)
    bad = torch.cat(found, -1)
    parts: Any = store.transform
    divided = all(isinstance(part, Balance) for part in parts)  # number by number, or not at all
    apart = divided and not isinstance(store.code, Sketch) and store.outliers is None
    return bad if apart else bad.any(-1, keepdim=True).expand(x.shape)


@law("P2", kinds=("normal", "huge"))
def infinity_saturates(case: Case) -> None:
    """Infinities are taken as +-65504 (as they are by Float("fp32")): it saturates and nothing becomes NaN."""
    k, v = case.pair(case.whole)
    params = case.params(k, v)
    at = tuple(case.random.randrange(n) for n in k.shape)
    _put(at, torch.inf if case.seed % 2 else -torch.inf, k, v)
    wanted = case.decoded(k, v, params)
    for side, got, want in zip(SIDES, roundtrip(case, k, v, params), wanted, strict=True):
        require_equal(f"decoded {side}", got, want)
        store = case.scheme.side(side)
        if not (isinstance(store.code, Float) and store.code.format == "fp32"):
            require(bool(got.isfinite().all()), f"decoded {side}: not finite")


def _grown(scheme: Scheme, name: str, numbers: Tensor, factor: float) -> Tensor | float:
    """What multiplies calibrated numbers where keys and values are multiplied by `factor`: those of their own size are,
    scales of angles are not."""
    side, _, inner = name.partition(".")
    store = scheme.side("keys" if side == "keys" else "values")
    place = dict(store.walk()).get(inner)
    if not isinstance(place, (Scale, ChannelShift, Sparse, Vectors)):
        return 1.0
    if not isinstance(place, Scale) or not store.polar:
        return factor
    radii = torch.arange(numbers.shape[-1]) < numbers.shape[-1] // 2
    return torch.where(radii, factor, 1.0)


def _everywhere(store: Store, holds: Tensor, x: Tensor) -> Tensor:
    """Whether something holds of the block of each number of x, or of every block of its vector where it is mapped."""
    if not store.turned:
        return spread(store, holds, x)
    coded = x.new_empty(*x.shape[:3], store.coded(x.shape[3]))
    return spread(store, holds, coded).all(-1, keepdim=True).expand(x.shape)


def _clipped(store: Store, clip: float) -> Store:
    """The store with one clip, which chosen channels with more bits have, too."""
    one = store.with_(**{"scale.clip": clip})
    if not isinstance(one, Parted) or one.raised is None:
        return one
    many = Store(one.raised.code, scale=one.scale)
    return replace(one, choice=replace(one.choice, store=many))


def _tried(store: Store) -> list[Store]:
    """The store with each of its clips alone, with and without its second fit: their scales are all that decides its
    codes, which clip is chosen, and what is stored."""
    if store.scale is None:
        return [store]
    clips = store.scale.clip if isinstance(store.scale.clip, tuple) else (store.scale.clip,)
    alone = [_clipped(store, clip) for clip in clips]
    return alone if store.scale.refit is None else [*alone, *(one.with_(**{"scale.refit": None}) for one in alone)]


def _with_its_block(store: Store, usual: Tensor) -> Tensor:
    """Where all numbers that share a stored one are usual: what is left of another one moves it, too."""
    if store.turned:
        usual = usual.all(-1, keepdim=True).expand(usual.shape)
    if isinstance(store.code, Sketch):
        return usual
    whole = coded = usual
    if store.turned:
        coded = usual[..., :1].expand(*usual.shape[:3], store.coded(usual.shape[3]))
    for part, numbers, _ in stretches(store, coded.double()):
        if isinstance(part.code, LowRank):
            whole = ~low_rank.any_in_block(~whole, part.code)
        if part.measure is not None and not static(part):
            held = blocks_of(part, numbers).amin((2, 4, 6))
            whole = whole & (_everywhere(part, held > 0, usual.double()) > 0)
    return whole


def _usual(one: TermOf, more: TermOf, factor: float) -> Tensor:
    """Where a term's stored numbers, of x and of x times a factor, are neither subnormal nor saturated."""
    usual = torch.ones(one.x.shape, dtype=torch.bool)
    for part in stretches(one.store, encoded_rows(one.store, one.x, one.params, one.place)):
        usual &= _usual_part(part, one, more, factor)
    return usual


def _usual_part(part: Stretch, one: TermOf, more: TermOf, factor: float) -> Tensor:
    """The same of a stretch of a term's numbers."""
    store, x, y = part.store, one.x, part.numbers
    usual = torch.ones(x.shape, dtype=torch.bool)
    if isinstance(store.code, LowRank):
        return low_rank.usual(one, more, store.code, factor)
    if isinstance(store.code, Chosen) and store.code.below:  # codes alone, under scales of the term of all channels
        return usual
    if isinstance(store.code, (Sparse, Chosen)):
        return sparse.usual(x, factor)
    if store.measure is None:
        if isinstance(store.code, (Codebook, Vectors)):  # angles do not grow, tables of vectors do
            return usual
        assert isinstance(store.code, Float)
        least, most = 2.0 ** LEAST[store.code.format], TOPS.get(store.code.format, float("inf"))
        usual = ((y.abs() >= least) | (y == 0)) & (y.abs() * factor < most)
        return usual.all(-1, keepdim=True).expand(x.shape) if store.turned else usual
    if store.measure.scale is not None:  # a second level grows with the scale, and what is stored stays the same
        return usual
    dtype = "fp32" if static(store) else store.measure.dtype
    least, most = max(2.0 ** LEAST[dtype], store.measure.floor), min(LARGEST, FORMATS[dtype][2]) / factor
    for tried in (part.put(one.store, tried) for tried in _tried(store)):
        before, after = (part.kept(quantize(tried, term.x, term.params, term.place)) for term in (one, more))
        pairs = [(before.scale, after.scale)]
        pairs += [(before.offset, after.offset)] if store.measure.zero == "min" else []
        for number, grown in pairs:
            if number is not None and grown is not None:
                # the least normal number may have been rounded up from among the others, and a zero down
                normal = ((number.abs() > least) | (number == 0) & (grown == 0)) & (number.abs() < most)
                usual &= _everywhere(store, normal, x)
    return usual


@law("P1", balanced.scaled, ("normal", "positive", "outlier_channel"))
def powers_of_two_go_through(case: Case) -> None:
    """Numbers times a power of two decode to the same times it, so the codes are the same, wherever the metadata is
    neither subnormal nor saturated: every operation rounds to as many bits before and after."""
    k, v = case.pair(case.whole)
    params = case.params(k, v)
    factor = 2.0 ** case.random.choice((1, 2, 3))
    bigger = {name: tensor * _grown(case.scheme, name, tensor, factor) for name, tensor in params.items()}
    once = roundtrip(case, k, v, params)
    twice = roundtrip(case, k * factor, v * factor, bigger)
    for side, whole, *found in zip(SIDES, (k, v), once, twice, strict=True):
        several = pieces(case.scheme.side(side), whole) or [(case.scheme.side(side), whole)]
        both = zip(*(x.split([part.shape[3] for _, part in several], -1) for x in found), strict=True)
        for (store, x), (first, second) in zip(several, both, strict=True):
            usual = torch.ones_like(first, dtype=torch.bool)
            # saturated numbers are alike, whatever they were
            if isinstance(store.outliers, Sparse) or isinstance(store.outliers, TopChannels) and store.outliers.online:
                usual &= bool((x.double().abs() * factor < LARGEST / 2).all())  # a pair without positions is longer
            terms = (terms_of(store, y, p, side, case.sinks) for y, p in ((x, params), (x * factor, bigger)))
            for one, more in zip(*terms, strict=True):
                usual = _with_its_block(one.store, usual) & _usual(one, more, factor)
            if store.rope is not None:
                usual = usual.all(-1, keepdim=True).expand(usual.shape)
            require_equal(f"decoded {side}", second[usual], (first * factor)[usual])
