"""How far a decoded number may lie from its original: a bound derived from the definitions, for every scheme.

Let a block have numbers of size at most A, L levels, the exact step s and the exact offset o; `store` rounds them to
the metadata format, moving v by at most dev(v) = max(u*|v|, e) + max(0, |v| - largest): u is half the spacing of the
format's numbers relative to them, e half its smallest number.

- Inside the range of the stored levels a number is off by at most f*s', s' <= s + dev(s) being the stored step: f = 1/2
  for nearest and for cells, 1 for floor.  (P1, P2)
- The stored levels may end short of the range: by at most L*dev(s) + dev(o), since L - 1 steps (L cells) lie between
  the ends.
- With an integer zero point z, the levels are moved by up to half a step, and x/s and z are rounded one by one, so f
  is larger by 1/2; z itself is stored with dev(z) <= dev(|o|/s + 1/2), which is s'*dev(z) in x.  Where a step above 0
  is stored as 0, z has no meaning and everything decodes to 0: the bound is A.
- signed_absmax has L/2 - 1 levels on the far side: a number there is off by up to one step, f = 1.
- Numbers beyond the size at a quantile are coded as if they were it.
- A clip below 1 cuts (1 - clip)*A off each end.
- in_scale rounds the step to a multiple of 2^bits in its last place: u = 2^(bits - 24).
- Float32 arithmetic: seven roundings of numbers up to A + s, each 2^-24 of it.  (c*s'+o, x - o, the quotient, hi - lo)

A calibrated scale has its levels given: f*s inside them, plus the distance to the nearest of them outside.

Levels of tables and small floats lie unevenly.  Under a stored scale s' in [s - dev(s), s + dev(s)]:

- Between two levels a number is off by half their distance at most, times s'; of a small float with m bits behind the
  first that is |x|*2^-(m+1), or s' times half the smallest number.
- Outside of the levels it is off by what the nearest end, at the s' that reaches least far, leaves of it.
- With an offset the same holds of x - o, and dev(o) is added.
- Where codes are decoded at other levels than numbers are compared with, s' times the most that these are apart is.

A second level S divides what is stored: dev(s) = S*dev(s/S), and dividing and multiplying round once each.

A scale chosen for the least squared error of its block does not do worse, summed, than any of the candidates: no number
is off by more than the root of the sum of the squared bounds of a candidate.  `fits.py` has scales that are fitted.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kvdsl.codes import width
from kvdsl.kernels import Params
from kvdsl.levels import table
from kvdsl.reference.alphabets import Alphabet, alphabet, given_table
from kvdsl.reference.quantize import encoded_rows, level_count, maps, quantize
from kvdsl.reference.rounding import MINIFLOATS
from kvdsl.reference.spaces import applied
from kvdsl.scheme import (
    Additive,
    Band,
    Bands,
    Block,
    Chosen,
    Codebook,
    Float,
    LowRank,
    Polar,
    Scale,
    Sketch,
    Sparse,
    Store,
    Uniform,
    Vectors,
    bands,
)
from kvdsl.spaces import apart

from . import additive, balanced, low_rank
from .fits import fitted
from .formats import LARGEST, OVER_BLOCK, SLACK, deviation, power_of_two, raised, within_quantile
from .rotary import partners, spread_waves
from .terms import behind, left_out, pieces, terms_of


def blocks_of(store: Store, x: Tensor) -> Tensor:
    """x (B, H, T, D) by the blocks that share a scale."""
    assert store.measure is not None
    return by_block(store.measure.block, x)


def by_block(block: Block, x: Tensor) -> Tensor:
    """x (B, H, T, D) as (B, H/bh, bh, T/bt, bt, D/bc, bc)."""
    batch, heads, tokens, channels = x.shape
    bh, bt, bc = (
        size if isinstance(size, int) else length
        for size, length in zip((block.heads, block.tokens, block.channels), (heads, tokens, channels), strict=True)
    )
    return x.reshape(batch, heads // bh, bh, tokens // bt, bt, channels // bc, bc)


def spread(store: Store, number: Tensor, x: Tensor) -> Tensor:
    """A number of every block (B, H/bh, T/bt, D/bc), or a calibrated one of (1, H/bh, 1, D/bc), at each place of x."""
    blocks = blocks_of(store, x)
    return number[:, :, None, :, None, :, None].expand(blocks.shape).reshape(x.shape)


def bound(store: Store, x: Tensor, params: Params | None = None, side: str = "keys", at: int = 0) -> Tensor:
    """The largest legal |x - x^|, float64 (B, H, T, D), for finite x (B, H, T, D) of whole blocks; `at` is the position
    of the first token."""
    if stretches := pieces(store, x):
        return torch.cat([bound(one, part, params, side, at) for one, part in stretches], -1)
    if store.rope is not None:
        return _roped_bound(store, x, params, side, at)
    if len(store.placed(side)) > 1:
        return _summed_bound(store, x, params, side, at)
    if store.mapped:
        return _mapped_bound(store, x, params, side)
    if store.polar:
        return _polar_bound(store, x, params, side)
    if store.balance is not None:
        return balanced.bound(store, x, lambda bare, y: bound(bare, y, params, side))
    given = x.double()
    inside = given.clamp(-LARGEST, LARGEST)
    if isinstance(store.code, LowRank):
        return low_rank.bound(x, store.code)
    if isinstance(store.code, Float) and store.code.format == "fp32":
        return torch.zeros_like(given)
    if isinstance(store.code, Vectors):
        assert params is not None
        return _vectors(store.code, inside, params[f"{side}.code"]) + (given - inside).abs()
    if isinstance(store.code, Codebook) and store.measure is None:
        assert isinstance(store, Band)
        levels = torch.tensor(table(store.code, store.channels), dtype=torch.float64)
        return (given[..., None] - levels).abs().amin(-1) + 2.0**-22
    if store.measure is None:
        assert isinstance(store.code, Float)
        return deviation(inside, store.code.format) + (given - inside).abs()
    numbers, scale = blocks_of(store, inside), store.measure
    if scale.when == "calibrated":
        assert params is not None
        if isinstance(store.code, Uniform):
            limit = _calibrated(store.code, scale, numbers, params[f"{side}.scale"].double().cpu(), level_count(store))
        else:
            limit = _given(store, numbers, params, side)
        return limit.reshape(x.shape) + (given - inside).abs()
    clips = scale.clip if isinstance(scale.clip, tuple) else (scale.clip,)
    limits = [_candidate(store, replace(scale, clip=clip), numbers, params, side) for clip in clips]
    limit = limits[0]
    if len(limits) > 1:
        roots = [one.square().sum(OVER_BLOCK, keepdim=True).sqrt() for one in limits]
        limit = torch.stack(roots).amin(0).expand_as(numbers)
    return limit.reshape(x.shape) + (given - inside).abs()


def _vectors(code: Vectors, x: Tensor, table: Tensor) -> Tensor:
    """No number is farther from its own than the nearest vector from all of its group, but for float32 sums."""
    groups, entries = x.unflatten(-1, (-1, code.channels)), table.double().cpu()
    far = torch.stack([(groups - entry).square().sum(-1) for entry in entries[:, None].unbind(3)]).amin(0)
    return (far.sqrt() * (1 + 2.0**-20)).repeat_interleave(code.channels, -1)


def _summed_bound(store: Store, x: Tensor, params: Params | None, side: str, at: int) -> Tensor:
    """What is left, x - x^, is coded itself, so that only its own error remains, of outlier channels on these alone,
    with more bits that of so many; difference and sum round once each, numbers of up to |x| + |x^| and their errors.
    What is left may be larger than x and saturates, too."""
    within = sizes = x.double().abs()
    lost = torch.zeros_like(within)
    for term in terms_of(store, x, params, side, at):
        code = term.store.code
        if isinstance(code, Chosen) and code.below:
            here = bound(code.choice.store, x, params, term.place, at)
        elif isinstance(code, (Sparse, Chosen)):
            numbers = term.x.abs().clamp(max=LARGEST)
            here = deviation(numbers, "fp16") + term.x.abs() - numbers
        else:
            here = bound(term.store, term.x, params, term.place, at)
        here = here if term.mine is None else torch.where(term.mine, here, within)
        if term.store.pick is not None and term.store.pick.top:
            assert params is not None
            top = apart(params[f"{side}.outliers"].cpu(), x.shape[3])
            here = torch.where(top[:, None], here, within)
        within, sizes = here, sizes + term.kept.decoded.abs()
        lost = lost + (term.x.abs() - LARGEST).clamp(min=0)
    return within + 2.0**-22 * (sizes + within) + lost + (x.double().abs() - LARGEST).clamp(min=0)


def _mapped_bound(store: Store, x: Tensor, params: Params | None, side: str) -> Tensor:
    """The bound of y = E x - u carried back by |W|, and what rounding of the maps and of two sums adds: W E is the
    identity but for 2^-24 of each factor, of which there are D in a sum, and for axes that are not kept."""
    found = maps(store, x.shape[3], x.shape[1], params, side)
    assert found is not None
    encode, _, decode, shift = (part.abs() for part in found)
    if isinstance(store.code, Sketch):  # signs say nothing of one channel: no farther than all of them add up to
        signs = quantize(store, x, params, side).coded.abs()
        return (applied(decode, signs) + x.double().abs()) * (1 + 2.0**-20)
    coded = encoded_rows(store.with_(transform=store.linear), x, params, side)
    last = Polar(store.levels) if store.polar else store.balance
    behind = store.with_(transform=(last,) if last else ())
    within = applied(decode, bound(behind, coded, params, side))
    if store.pick:  # the other channels are not read
        within = within.where((decode != 0).any(-1)[:, None], x.double().abs())
    within = within + left_out(x, found) if store.short else within
    size = applied(decode, applied(encode, x.double().abs().clamp(max=LARGEST))) + shift[:, None]
    return within + 2.0**-22 * size + (x.double().abs() - LARGEST).clamp(min=0)


def _polar_bound(store: Store, x: Tensor, params: Params | None, side: str) -> Tensor:
    """Of a pair whose radius is off by e and whose angle by f: |r cos a - r^ cos a^| <= e |cos a^| + r |cos a - cos a^|
    <= e + r min(f, 2), and what rounding of an angle up to 2 pi adds, 2^-22 of the radius, and of the others.

    Of several levels the radius of one is a channel of the next: e + r (f1 + f2 + ...), r the last one's radius."""
    coded = encoded_rows(store, x, params, side)
    sizes = [coded.shape[-1] >> level + 1 for level in range(store.levels)]
    if isinstance(store.code, Bands):
        pieces = zip(bands(store), coded.split([sizes[-1], *sizes], -1), strict=True)
        off, *turned = (bound(replace(band, transform=()), piece, params, side) for band, piece in pieces)
    else:
        off, *turned = bound(store.with_(transform=()), coded, params, side).split([sizes[-1], *sizes], -1)
    radius = coded[..., : sizes[-1]].double()

    def whole(part: Tensor) -> Tensor:
        return part.repeat(1, 1, 1, x.shape[3] // part.shape[-1])

    far = sum(whole(turn.clamp(max=2)) for turn in turned)
    carried = whole(off) + whole(radius) * far + 2.0**-20 * store.levels * whole(radius + off)
    return carried + (x.double().abs() - LARGEST).clamp(min=0)


def _roped_bound(store: Store, x: Tensor, params: Params | None, side: str, at: int) -> Tensor:
    """The bound of y = R_t^-1 x, or of what maps behind it make of it, carried back by |R_t|, and what rounding adds:
    R_t R_t^-1 is the identity but for 2^-23 of its factors, and either rotation rounds once.

    |R_t| takes a bound e of (a, b) to (e_a |cos| + e_b |sin|, e_b |cos| + e_a |sin|).
    """
    assert params is not None
    inside = x.double().abs().clamp(max=LARGEST)
    without, before, given = behind(store, x, params, at)
    within = bound(without, before, given, side)
    size = inside + partners(store, inside, params)
    cos, sin = (wave.double().abs() for wave in spread_waves(store, params, at, x.shape[2], x.shape[3]))
    carried = within * cos + partners(store, within, params) * sin
    return carried + 2.0**-21 * (size + within) + (x.double().abs() - LARGEST).clamp(min=0)


def second(store: Store, params: Params | None, side: str) -> Tensor | float:
    """The second level, (1, H or 1, 1, 1); 1 where there is none."""
    if store.measure is None or store.measure.scale is None:
        return 1.0
    assert params is not None
    return params[f"{side}.scale.scale"].double().cpu()[None, :, None, :]


def _candidate(store: Store, scale: Scale, numbers: Tensor, params: Params | None, side: str) -> Tensor:
    """The bound under one clip, fitted or not: float64, as numbers (B, H/bh, bh, T/bt, bt, D/bc, bc)."""
    near = within_quantile(scale, numbers)
    if isinstance(store.code, Additive):
        assert params is not None
        return additive.bound(store.code, numbers, params[f"{side}.code"], scale)
    if isinstance(store.code, Uniform):
        limit = _online(store.code, scale, near, level_count(store), _outer(store, params, side))
    else:
        limit = _uneven(store, scale, near, params, side)
    limit = limit + (numbers - near).abs()
    if scale.refit is None:
        return limit
    letters = _letters(store, numbers.shape[-1], params, side)
    return fitted(scale, limit, numbers, max(letters.top, abs(letters.lowest)), _outer(store, params, side))


def _letters(store: Store, channels: int, params: Params | None, side: str) -> Alphabet:
    return alphabet(store, channels, given_table(store, params, side))


def _outer(store: Store, params: Params | None, side: str) -> Tensor | float:
    """The second level, spread over blocks with kept axes."""
    outer = second(store, params, side)
    return outer if isinstance(outer, float) else outer[:, :, None, :, None, :, None]


def _stored_step(scale: Scale, step: Tensor, outer: Tensor | float, spare: int = 0) -> Tensor:
    """dev of a stored number, a second level taken into account."""
    if isinstance(outer, float):
        return deviation(step, scale.dtype, spare)
    return outer * deviation(step / outer, scale.dtype, spare) + step.abs() * 2.0**-22


def _uneven(store: Store, scale: Scale, numbers: Tensor, params: Params | None, side: str) -> Tensor:
    """Of a table's or a small float's levels under a scale measured online."""
    assert not isinstance(scale.clip, tuple)
    letters, outer = _letters(store, numbers.shape[-1], params, side), _outer(store, params, side)
    low, high = numbers.amin(OVER_BLOCK, keepdim=True), numbers.amax(OVER_BLOCK, keepdim=True)
    largest = numbers.abs().amax(OVER_BLOCK, keepdim=True)
    offset, moved_offset = torch.zeros_like(largest), torch.zeros_like(largest)
    if scale.dtype == "e8m0":
        step = power_of_two(scale, largest, letters.top)
    elif scale.range == "norm":
        step = scale.clip * numbers.square().mean(OVER_BLOCK, keepdim=True).sqrt()
    elif scale.range == "absmean":
        step = scale.clip * numbers.abs().mean(OVER_BLOCK, keepdim=True)
    elif scale.range == "absmax":
        step = scale.clip * largest / letters.top
    elif scale.range == "signed_absmax":
        step = scale.clip * torch.where(high >= -low, high, low) / letters.lowest
    else:
        low, high = scale.clip * low, scale.clip * high
        if scale.range == "minmax_zero":
            low, high = low.clamp(max=0), high.clamp(min=0)
        step, offset = (high - low) / 2, (high + low) / 2
        moved_offset = _stored_step(scale, offset, outer) + SLACK * largest
    moved = _stored_step(scale, step := raised(scale, step, outer), outer)
    return _levelled(store, letters, numbers - offset, step, moved) + moved_offset + SLACK * (largest + numbers.abs())


def _given(store: Store, numbers: Tensor, params: Params, side: str) -> Tensor:
    """The same under a calibrated scale."""
    assert store.measure is not None
    ranged = store.measure.range in ("minmax", "minmax_zero")
    given = params[f"{side}.scale"].double().cpu()
    step = (given[0] if ranged else given)[None, :, None, None, None, :, None]
    offset = given[1][None, :, None, None, None, :, None] if ranged else torch.zeros_like(step)
    letters = _letters(store, numbers.shape[-1], params, side)
    slack = SLACK * (2 * numbers.abs() + offset.abs() + step.abs())
    return _levelled(store, letters, numbers - offset, step, torch.zeros_like(step)) + slack


def _levelled(store: Store, letters: Alphabet, numbers: Tensor, step: Tensor, moved: Tensor) -> Tensor:
    """|x - s'*level| for the nearest level, s' within `moved` of `step`, of the same sign, and how far from that level
    its code is decoded."""
    if isinstance(store.code, Float):
        kind = MINIFLOATS[store.code.format]
        least = 2.0 ** (kind.lowest - kind.mantissa)
        half = numbers.abs() * 2.0 ** -(kind.mantissa + 1) + (step.abs() + moved) * least / 2
        every, away = torch.tensor([-kind.top, kind.top], dtype=torch.float64), 0.0
    else:
        assert letters.compared is not None
        codes, every = torch.arange(letters.count, dtype=torch.float64), letters.compared
        half = (step.abs() + moved) * float(every.diff().max()) / 2
        away = float((letters.level(codes, torch.zeros((), dtype=torch.float64)) - every).abs().max())
    outside = torch.zeros_like(numbers)
    for size in ((step.abs() - moved).clamp(min=0), step.abs() + moved):
        ends = torch.stack([size * step.sign() * every[0], size * step.sign() * every[-1]])
        beyond = torch.maximum(numbers - ends.amax(0), ends.amin(0) - numbers)
        outside = torch.maximum(outside, beyond)
    within = torch.maximum(half.expand_as(numbers), outside) + away * (step.abs() + moved)
    return within + torch.where(step == 0, numbers.abs(), 0.0)


def _factor(code: Uniform, scale: Scale) -> float:
    if scale.range == "signed_absmax":
        return 1.0
    rounded = 1.0 if code.rounding == "floor" and code.grid == "ends" else 0.5
    return rounded + (0.5 if scale.zero != "min" else 0.0)


def _online(code: Uniform, scale: Scale, numbers: Tensor, levels: int, outer: Tensor | float = 1.0) -> Tensor:
    assert not isinstance(scale.clip, tuple)
    axes = (2, 4, 6)
    largest = numbers.abs().amax(axes, keepdim=True)
    low, high = scale.clip * numbers.amin(axes, keepdim=True), scale.clip * numbers.amax(axes, keepdim=True)
    if scale.range == "minmax_zero" or scale.zero == "in_scale":
        low, high = low.clamp(max=0), high.clamp(min=0)
    symmetric = scale.range in ("absmax", "signed_absmax")
    if scale.range == "absmax":
        step = scale.clip * largest * (2 / levels if code.grid == "cells" else 1 / ((levels - 1) // 2))
    elif scale.range == "signed_absmax":
        step = scale.clip * largest / (levels // 2)
    else:
        step = (high - low) / (levels if code.grid == "cells" else levels - 1)

    spare = (width(code) or 0) if scale.zero_inside else 0
    if scale.dtype == "e8m0":
        top = levels / 2 if code.grid == "cells" else (levels - 1) // 2
        exact, step = step, power_of_two(scale, largest, top)
        short = (exact - step).clamp(min=0)  # a power below the step: the range ends short
        return _factor(code, scale) * step + levels * short + max(0.0, 1 - scale.clip) * largest + SLACK * largest
    step = raised(scale, step, outer)
    moved = _stored_step(scale, step, outer, spare)
    limit = _factor(code, scale) * (step + moved) + levels * moved + max(0.0, 1 - scale.clip) * largest
    if not symmetric and scale.zero == "min":
        limit = limit + _stored_step(scale, low, outer)
    elif not symmetric and scale.zero == "point":
        least = (step - moved).clamp(min=0)
        point = low.abs() / torch.where(least == 0, torch.ones_like(least), least) + 0.5
        limit = limit + levels * moved + (step + moved) * deviation(point, scale.dtype)
        limit = torch.where(least == 0, limit + largest, limit)
        limit = torch.where(step == 0, deviation(low, scale.dtype) + (1 - scale.clip) * largest, limit)
    elif not symmetric:
        limit = limit + levels * moved
        if scale.zero == "held_in_scale":  # codes begin at 0 at the farthest
            limit = limit + torch.maximum(low, -high).clamp(min=0)
    return limit + 7 * 2.0**-24 * (largest + step) + (0.0 if isinstance(outer, float) else SLACK * largest)


def _calibrated(code: Uniform, scale: Scale, numbers: Tensor, given: Tensor, levels: int) -> Tensor:
    ranged = scale.range in ("minmax", "minmax_zero")
    step = (given[0] if ranged else given)[None, :, None, None, None, :, None]
    half = 0.5 if code.grid == "cells" else 0.0
    if ranged:
        bottom = given[1][None, :, None, None, None, :, None] + step * half
    else:
        shift = levels // 2 if scale.range == "signed_absmax" or code.grid == "cells" else (levels - 1) // 2
        bottom = step * (half - shift)
    top = bottom + step * (levels - 1)
    outside = torch.maximum(numbers - top, bottom - numbers).clamp(min=0)
    floor = code.rounding == "floor" and code.grid == "ends"
    slack = 7 * 2.0**-24 * (numbers.abs() + top.abs() + bottom.abs())
    return torch.maximum((1.0 if floor else 0.5) * step.expand_as(numbers), outside) + slack
