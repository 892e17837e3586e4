"""One store applied to one tensor.

A side's vectors are brought into the space that is coded.  There every block of `tokens` x `channels` x `heads` numbers
is measured, its scale (and offset) stored in the metadata format, and its numbers coded with what was stored.  Blocks
are counted from the first token given.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from kvdsl.codes import Additive, Bands, Chosen, Float, LowRank, Sketch, Sparse, Vectors
from kvdsl.errors import ShapeError
from kvdsl.scheme import Band, Parted, Scale, Store, Uniform, bands

from .additive import summed
from .alphabets import Alphabet, alphabet, given_table, has_offset, holds_numbers, level_count
from .balance import balancing, divided, spread
from .blocks import block_size, cut, join
from .chosen import among, choose, gathered, kept_of, put_back
from .low_rank import factors, multiplied
from .measure import Measured, measure, refitted, shifted
from .rounding import LARGEST_INPUT, MINIFLOATS, f32, ratio, sum64
from .spaces import At, Params, cartesian, encoded, maps, polar, restored, widened, with_rope, without_rope
from .sparse import Picked, kept_numbers, pick, placed

__all__ = ["Params", "Quantized", "encoded_rows", "level_count", "links", "maps", "quantize", "widened"]


@dataclass(frozen=True)
class Quantized:
    """What a store keeps of a tensor (B, H, T, D), as float64 and int64; M = D but for a sketch.

    codes    int64 (B, H, T, M), 0..levels-1, of a minifloat its bits; None where fp16 or fp32 numbers are kept
    scale    float64 (B, H / heads, T / tokens, M / channels), one number a block, exactly as stored: NaN where the
             block held a NaN; (1, H / heads, 1, M / channels) if calibrated; None without one
    offset   as scale: the minimum (of a codebook the middle), or the integer zero point; None where the range has none
    decoded  float64 (B, H, T, D), every number a float32 number
    coded    float64 (B, H, T, M): the same in the space that is coded
    residual the same of the next term, outlier channels or what is left: of x - x^ in float32 of this store's x^;
             `decoded` is the sum of both, in float32
    bands    the same of every stretch, whose numbers are those of the coded space; codes and scales are theirs
    factors  (B, H, T, rank) and (B, H, blocks, rank, D), of vectors of low rank: no codes
    slots    of single numbers that are kept as they are: where they stand, int64, and what is kept of each
    across   float64 (B, H, T) of tokens, or (B, H, tiles, D): the stored factors of tiles; `coded` has them
    channels int64 (B, H, T / per, n), rising: which channels these numbers are of, where they are chosen anew; then
             codes and coded numbers of codes beside those of all channels are (B, H, T, n)
    """

    codes: Tensor | None
    scale: Tensor | None
    offset: Tensor | None
    decoded: Tensor
    coded: Tensor
    residual: Quantized | None = None
    bands: tuple[Quantized, ...] = ()
    factors: tuple[Tensor, Tensor] | None = None
    slots: tuple[Tensor, Tensor] | None = None
    channels: Tensor | None = None
    across: Tensor | None = None

    @property
    def terms(self) -> tuple[Quantized, ...]:
        """This and what is kept of the terms behind it, or the stretches, as `Store.terms`."""
        return self.bands or (self, *(self.residual.terms if self.residual else ()))


def quantize(store: Store, x: Tensor, params: Params | None = None, side: str = "keys", at: At = 0) -> Quantized:
    """Codes, stored metadata and decoded numbers of every number of `x` (B, H, T, D), whole blocks.

    `at` is the position of the first token in its sequence, or int64 (B, H, T) that of each, which count where rotary
    positions are taken off.

    `params` holds what is calibrated: `<side>.scale`, `<side>.scale.scale`, `<side>.code`, `<side>.transform[<i>]`.
    Raises ShapeError for a tensor that is no whole number of blocks and for params missing or of another shape.
    """
    kept = [one.kept for one in links(store, widened(x, side), params, side, at)]
    whole = kept.pop()
    for one in reversed(kept):
        whole = replace(one, decoded=f32(one.decoded + whole.decoded), residual=whole)
    return replace(whole, decoded=with_rope(store, whole.decoded, params, side, at))


class Link(NamedTuple):
    """One term of a store: what it is given of x (B, H, T, D) without positions, where they come off, and what it keeps
    of that, without them, too; of which numbers alone it is, bool as x, where not of all; of single numbers that are
    kept as they are also how they were picked."""

    store: Store
    place: str
    given: Tensor
    kept: Quantized
    mine: Tensor | None = None
    picked: Picked | None = None


def links(store: Store, x: Tensor, params: Params | None = None, side: str = "keys", at: At = 0) -> Iterator[Link]:
    """The terms of a store, one after the other: each is given what those before it left of x, the first one x with
    other numbers where single ones are taken out."""
    x = rest = without_rope(store, x, params, side, at)
    picked = None
    if isinstance(store.outliers, Sparse):
        picked = pick(x, store.outliers, side, _thresholds(store.outliers, x, params, side))
    terms, above = store.placed(side), None
    own = terms[0][1]
    channels = choose(x, own.choice) if isinstance(own, Parted) else None
    for position, (place, term) in enumerate(terms):
        if isinstance(term, Parted):
            assert channels is not None
            given, mine, kept, above = _beside_chosen(term, x, rest, channels, params, place)
            yield Link(term, place, given, kept, mine)
        elif isinstance(term.code, Chosen):
            assert channels is not None
            mine = among(channels, term.code.choice, x.shape[3])
            kept = _of_chosen(term.code, rest, channels, above)
            yield Link(term, place, torch.where(mine, rest, 0.0), kept, mine)
        elif isinstance(term.code, Sparse):
            assert picked is not None
            numbers = kept_numbers(rest, picked, side)
            decoded = placed(numbers, picked, side)
            given = torch.where(picked.kept, rest, 0.0)
            kept = Quantized(None, None, None, decoded, decoded, slots=(picked.places, numbers))
            yield Link(term, place, given, kept, picked.kept, picked)
        else:
            given = rest if picked is None or position else picked.filled
            kept = _alone(term, given, params, place)
            yield Link(term, place, given, kept)
        rest = left(rest, kept.decoded)


def _thresholds(code: Sparse, x: Tensor, params: Params | None, side: str) -> Tensor | None:
    """Those of single numbers of x (B, H, T, D), (2, H, D), where they are calibrated."""
    if code.when == "online":
        return None
    what = f"the thresholds of the {side} are calibrated, give their numbers"
    return _calibrated(params, f"{side}.outliers", (2, x.shape[1], x.shape[3]), what)


def _beside_chosen(
    store: Parted, x: Tensor, rest: Tensor, channels: Tensor, params: Params | None, place: str
) -> tuple[Tensor, Tensor | None, Quantized, Quantized | None]:
    """What a store beside that of chosen channels, or that one, is given of x or of what is left, of which numbers it
    is alone, and what it keeps; the bits above its own, where chosen channels have more."""
    theirs = among(channels, store.choice, x.shape[3])
    if store.masked:
        mine = theirs == store.top
        given = torch.where(mine, rest, 0.0)
        kept = _alone(store, given, params, place)
        decoded = torch.where(mine, kept.decoded, 0.0)
        return given, mine, replace(kept, decoded=decoded, channels=channels if store.top else None), None
    if store.raised is None:
        given = torch.where(theirs, 0.0, x)
        return given, None, _alone(store, given, params, place), None
    return x, None, *_both(store, x, theirs, params, place)


def _of_chosen(code: Chosen, rest: Tensor, channels: Tensor, above: Quantized | None) -> Quantized:
    """What is kept of chosen channels beside codes of all channels: what these left of them, or bits `above`."""
    if above is None:
        numbers = kept_of(rest, channels, code)
        decoded = put_back(numbers, channels, code.choice, rest.shape[3])
        return Quantized(None, None, None, decoded, numbers, channels=channels)
    assert above.codes is not None
    codes, coded = (gathered(part, channels, code.choice) for part in (above.codes, above.decoded))
    return Quantized(codes, None, None, above.decoded, coded, channels=channels)


def _both(store: Parted, x: Tensor, theirs: Tensor, params: Params | None, place: str) -> tuple[Quantized, Quantized]:
    """Codes of all channels, of the chosen ones (`theirs`, as x) their lowest bits under scales of more levels; and the
    bits above these, times their worth, 0 of the other channels."""
    assert store.raised is not None and isinstance(store.code, Uniform) and store.code.bits is not None
    few, many = (_alone(Store(one.code, scale=one.scale), x, params, place) for one in (store, store.raised))
    assert few.codes is not None and many.codes is not None and few.scale is not None and many.scale is not None
    worth = 2**store.code.bits
    scale_of_theirs = theirs[:, :, :: x.shape[2] // few.scale.shape[2]]
    scale = torch.where(scale_of_theirs, many.scale, few.scale)
    offset = None
    if few.offset is not None and many.offset is not None:
        offset = torch.where(scale_of_theirs, many.offset, few.offset)
    codes = torch.where(theirs, many.codes % worth, few.codes)
    assert store.measure is not None
    size = block_size(store.measure.block, x.shape, place)
    low, point = shifted(Measured(scale, offset, scale, offset), store.measure)
    numbers = f32(scale[..., None] * alphabet(store, 1, None).level(cut(codes.double(), size), point))
    decoded = join(numbers if isinstance(low, float) else f32(numbers + low), x.shape, size)
    above = torch.where(theirs, many.codes // worth, 0)
    more = join(f32(scale[..., None] * worth * cut(above.double(), size)), x.shape, size)
    more = torch.where(theirs, more, 0.0)
    return Quantized(codes, scale, offset, decoded, decoded), Quantized(above, None, None, more, more)


def _alone(store: Store, x: Tensor, params: Params | None, side: str) -> Quantized:
    """The same of a store without what it leaves, of x without positions."""
    if isinstance(store.code, LowRank):
        found = factors(x, store.code)
        decoded = multiplied(*found)
        return Quantized(None, None, None, decoded, decoded, factors=found)
    mapped = maps(store, x.shape[3], x.shape[1], params, side)
    y = polar(store, encoded(x, mapped))
    across, each = None, None
    if (part := store.balance) is not None:
        across = balancing(y, part, of_tokens=store.of_tokens)
        each = spread(across, part, of_tokens=store.of_tokens)
        # infinities saturate before they are divided, as they do before a map, whose numbers may be larger
        y = divided(y if mapped is not None else y.clamp(-LARGEST_INPUT, LARGEST_INPUT), each)
    bands = _banded(store, x, y, params, side)
    if bands:
        codes, scale, offset, coded = None, None, None, torch.cat([band.coded for band in bands], -1)
    else:
        codes, scale, offset, coded = _coded(store, x, y, params, side)
    coded = coded if each is None else f32(coded * each)
    decoded = restored(cartesian(store, coded), mapped)
    return Quantized(codes, scale, offset, decoded, coded, None, bands, across=across)


def left(x: Tensor, decoded: Tensor) -> Tensor:
    """x - x^ in float32, x (B, H, T, D) saturated at +-65504; NaN where either is."""
    return f32(torch.where(x.isnan(), x, x.clamp(-LARGEST_INPUT, LARGEST_INPUT)) - decoded)


def encoded_rows(store: Store, x: Tensor, params: Params | None = None, side: str = "keys", at: int = 0) -> Tensor:
    """x (B, H, T, D) in the space that is coded, float32 (B, H, T, M); every number of a vector with a NaN is NaN."""
    x = without_rope(store, widened(x, side), params, side, at)
    return polar(store, encoded(x, maps(store, x.shape[3], x.shape[1], params, side))).to(torch.float32)


def _banded(store: Store, x: Tensor, y: Tensor, params: Params | None, side: str) -> tuple[Quantized, ...]:
    """What is kept of every stretch of y; nothing where the store is of no stretches."""
    if not isinstance(store.code, Bands):
        return ()
    pieces = y.split([int(y.shape[-1] * band.share) for band in bands(store)], -1)
    kept = (_coded(band, x, piece, params, side) for band, piece in zip(bands(store), pieces, strict=True))
    return tuple(Quantized(codes, scale, offset, coded, coded) for codes, scale, offset, coded in kept)


Coded = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]


def _coded(store: Store, x: Tensor, y: Tensor, params: Params | None, side: str) -> Coded:
    """Codes, scale, offset and decoded numbers of y, the coded space of x."""
    code, scale = store.code, store.measure
    if holds_numbers(store):
        assert isinstance(code, Float)
        return None, None, None, _number(y, code)
    if isinstance(code, Vectors):
        return _vectors(y, code, params, side)
    if isinstance(code, Additive):
        right = (y.shape[1], code.of(y.shape[3]).count, 1 << code.bits, y.shape[3])
        table = _calibrated(params, f"{side}.code", right, f"vectors of the {side} are calibrated, give their numbers")
        return summed(_finite(y), y.isnan(), store, table, side)
    if scale is None:
        return _unscaled(y, store)
    size = block_size(scale.block, y.shape, side)
    letters = alphabet(store, x.shape[3] if isinstance(code, Sketch) else size[2], given_table(store, params, side))
    numbers = cut(y, size)
    invalid = numbers.isnan().any(-1)
    numbers = _finite(numbers)
    if isinstance(code, Sketch):
        found = measure(_finite(x)[..., None, :], code, scale, 1.0, letters, None)
        c = (numbers > 0).to(torch.float64)  # whatever the norm is stored as
        decoded = f32(found.s[..., None] * letters.level(c, torch.zeros((), dtype=torch.float64)))
    elif scale.when == "calibrated":
        found = _given(store, y.shape, size, params, side)
        c, decoded = _letters(numbers, found, scale, letters)
    else:
        second = _second(scale, y.shape[1], size[0], params, side)
        found, c, decoded = _best(numbers, store, scale, letters, second)
    final, spoiled = found.scale, decoded
    if scale.when == "online":
        final = torch.where(invalid, torch.full_like(found.scale, float("nan")), found.scale)
        spoiled = torch.where(invalid[..., None], torch.full_like(decoded, float("nan")), decoded)
    return join(c, y.shape, size).to(torch.int64), final, found.offset, join(spoiled, y.shape, size)


def _best(
    x: Tensor, store: Store, scale: Scale, letters: Alphabet, second: Tensor | None
) -> tuple[Measured, Tensor, Tensor]:
    """Measure, code and decode blocks (..., numbers) under every clip; of each block the first with the least error."""
    clips = scale.clip if isinstance(scale.clip, tuple) else (scale.clip,)
    best: tuple[Measured, Tensor, Tensor] | None = None
    least = torch.zeros(())
    for clip in clips:
        found = measure(x, store.code, scale, clip, letters, second)
        c, decoded = _letters(x, found, scale, letters)
        if scale.refit is not None:
            none = torch.zeros((), dtype=torch.float64)
            found = refitted(x, letters.level(c, none), found, scale, second)
            decoded = f32(found.s[..., None] * letters.level(c, none))
        error = sum64((x - decoded) ** 2)
        if best is None:
            best, least = (found, c, decoded), error
            continue
        better = error < least
        best, least = _chosen(better, (found, c, decoded), best), torch.where(better, error, least)
    assert best is not None
    return best


def _chosen(
    better: Tensor, new: tuple[Measured, Tensor, Tensor], old: tuple[Measured, Tensor, Tensor]
) -> tuple[Measured, Tensor, Tensor]:
    """Of every block the new or the old."""

    def of(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(better if a.dim() == better.dim() else better[..., None], a, b)

    def maybe(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        return None if a is None or b is None else of(a, b)

    (a, c, x), (b, d, y) = new, old
    found = Measured(of(a.scale, b.scale), maybe(a.offset, b.offset), of(a.s, b.s), maybe(a.o, b.o))
    return found, of(c, d), of(x, y)


def _letters(x: Tensor, found: Measured, scale: Scale, letters: Alphabet) -> tuple[Tensor, Tensor]:
    """Codes of (..., numbers) under the scales of (...), and the numbers that they stand for."""
    low, point = shifted(found, scale)
    s = found.s[..., None]
    c = letters.encode(ratio(f32(x - low), s), point)
    decoded = f32(s * letters.level(c, point))
    return c, decoded if isinstance(low, float) else f32(decoded + low)


def _finite(x: Tensor) -> Tensor:
    return torch.where(x.isnan(), torch.zeros_like(x), x).clamp(-LARGEST_INPUT, LARGEST_INPUT)


def _number(y: Tensor, code: Float) -> Tensor:
    if code.format == "fp32":
        return y
    return y.clamp(-LARGEST_INPUT, LARGEST_INPUT).to(torch.float16).to(torch.float64)


def _unscaled(y: Tensor, store: Store) -> Coded:
    """A minifloat of the numbers themselves: a NaN is the format's own, where it has one.  Or angles: a NaN is any."""
    code, none = store.code, torch.zeros((), dtype=torch.float64)
    letters = alphabet(Store(code), store.channels if isinstance(store, Band) else 1, None)
    c = letters.encode(y.clamp(-LARGEST_INPUT, LARGEST_INPUT), none)
    decoded = letters.level(c, none)
    kept = isinstance(code, Float) and MINIFLOATS[code.format].nan
    return c.to(torch.int64), None, None, torch.where(y.isnan(), y, decoded) if kept else decoded


def _vectors(y: Tensor, code: Vectors, params: Params | None, side: str) -> Coded:
    """Of every group of channels the code of the nearest vector of its table, and that vector; a NaN counts as 0."""
    right = (y.shape[1], y.shape[3] // code.channels, 1 << code.bits, code.channels)
    table = _calibrated(params, f"{side}.code", right, f"vectors of the {side} are calibrated, give their numbers")
    table = table.to(torch.float16).to(torch.float64)
    numbers = _finite(y).unflatten(-1, (-1, code.channels))
    least = torch.full(numbers.shape[:-1], float("inf"), dtype=torch.float64)
    codes = torch.zeros_like(least, dtype=torch.int64)
    for entry in range(1 << code.bits):
        far = torch.zeros_like(least)
        for channel in range(code.channels):
            apart = f32(numbers[..., channel] - table[:, None, :, entry, channel])
            far = f32(far + f32(apart * apart))
        codes = torch.where(far < least, entry, codes)
        least = torch.minimum(far, least)
    heads, groups = (torch.arange(n) for n in right[:2])
    decoded = table[heads[:, None, None], groups, codes]
    return codes, None, None, decoded.flatten(-2)


def _given(store: Store, shape: torch.Size, size: tuple[int, int, int], params: Params | None, side: str) -> Measured:
    """Scale and offset of a calibrated store, (1, H / heads, 1, D / channels) each."""
    assert store.measure is not None
    blocks = (shape[1] // size[0], shape[3] // size[2])
    right = (2, *blocks) if has_offset(store.measure) else blocks
    numbers = _calibrated(params, f"{side}.scale", right, f"the scale of the {side} is calibrated, give its numbers")
    s = (numbers[0] if len(right) == 3 else numbers)[None, :, None, :]
    o = numbers[1][None, :, None, :] if len(right) == 3 else None
    return Measured(s, o, s, o)


def _second(scale: Scale, heads: int, block_heads: int, params: Params | None, side: str) -> Tensor | None:
    """The second level, broadcast over (B, H / heads, T / tokens, D / channels); None where the scale has none."""
    if scale.scale is None:
        return None
    rows = heads if scale.scale.block.heads == 1 else 1
    what = f"the second scale of the {side} is calibrated, give its numbers"
    numbers = _calibrated(params, f"{side}.scale.scale", (rows, 1), what)
    return numbers[None, ::block_heads, None, :] if rows > 1 else numbers[None, :, None, :]


def _calibrated(params: Params | None, name: str, shape: tuple[int, ...], what: str) -> Tensor:
    if params is None or name not in params:
        raise ShapeError(f"params[{name!r}]: missing; {what}")
    if tuple(params[name].shape) != shape:
        raise ShapeError(f"params[{name!r}]: shape {tuple(params[name].shape)}; the right one is {shape}")
    return f32(params[name].detach().cpu())
