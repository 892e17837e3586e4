"""What the kernels' products are of: codes times scales in the space that is coded, exact numbers as they are.

A turned side is two vectors side by side, (M numbers of the code, D exact channels), one of them zero; a query is
mapped to match: (W^T q, q).  Of heads that are rotated together M counts the numbers of all.  Where what is left is
coded, too, the numbers of every term stand before the channels.  So a score is the product of both, whatever a side's
space is.  Rotary positions are put back on decoded numbers, so that there the product is of the number itself; so it is
of pairs in polar coordinates, before W if there is one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvdsl.kernels import Backend, Params
from kvdsl.levels import table
from kvdsl.reference.quantize import Quantized, encoded_rows, maps
from kvdsl.reference.queries import rounded
from kvdsl.reference.spaces import applied, by_head, cartesian, joined, with_rope
from kvdsl.reference.timeline import contents
from kvdsl.scheme import Bands, Chosen, Codebook, LowRank, Parted, Scheme, Side, Sketch, Sparse, Store, Uniform

from . import low_rank
from .bounds import second, spread
from .rotary import partners, roundings
from .terms import TermOf, pieces, stretches, terms_of

Largest = Callable[[Store, Tensor, Params], Tensor]


def sides_of(store: Store, x: Tensor, span: tuple[int, int], params: Params, side: Side) -> tuple[Tensor, Tensor]:
    """What a cache holds of x (1, H, T, D) with tokens `span` packed, float64 (1, H, T, D), and the factors of products
    with it (1, H, T, D or M + D): code times scale, without what is added beside it, and exact numbers."""
    if stretches := pieces(store, x):
        found = [sides_of(one, part, span, params, side) for one, part in stretches]
        return torch.cat([one for one, _ in found], -1), torch.cat([other for _, other in found], -1)
    first, end = span
    whole = contents(store, x, span, params, side)
    exact = whole.clone()
    part = x.new_zeros(*x.shape[:3], sum(_widths(store, x.shape[3])), dtype=torch.float64)
    if end > first:
        met = []
        for term in terms_of(store, x[:, :, first:end], params, side, first):
            if store.rope is not None:
                met.append(with_rope(store, term.kept.decoded, params, side, first))
                continue
            one = _factors(term.store, term.kept, params, term.place)
            met.append(_met(term.store, one) if not _masked(term) else _unmapped(term, one, params))
        factors = torch.cat(met, -1)
        part[:, :, first:end] = factors
        exact[:, :, first:end] = 0 if store.apart else factors
    return whole, torch.cat((part, exact), -1) if store.apart else exact


def _widths(store: Store, channels: int, *, sizes: bool = False) -> list[int]:
    """Numbers that a vector of `channels` is coded as, by each term, with those of heads that are rotated together; of
    masked vectors its channels, to bound products (`sizes`) beside what it is coded as."""
    found = []
    for _, term in store.placed(""):
        masked, coded = isinstance(term, Parted) and term.masked, term.coded(channels)
        coded = channels + (coded if sizes else 0) if masked else coded
        whole = isinstance(term.code, Chosen) or term.rope is not None  # of some, others for every few tokens; turned
        coded = channels if whole else coded
        found.append(coded * (term.joined if term.hoisted else 1))
    return found


def _met(store: Store, numbers: Tensor) -> Tensor:
    """What a head's query meets, and its outputs are of, (1, H, T, G M): the numbers (1, H, T, M) of all heads that are
    rotated together; where keys are mapped back in the loop, the head's own."""
    together = store.joined if store.hoisted else 1
    return joined(numbers, together).repeat_interleave(together, 1)


def _factors(store: Store, numbers: Quantized, params: Params, side: str) -> Tensor:
    """Code (or level) times scale: what remains of coded numbers without their offset.  Evenly spaced levels are codes,
    counted from the lowest."""
    if isinstance(store.code, Chosen):
        return numbers.decoded
    if store.measure is None or store.polar:
        return cartesian(store, numbers.coded)
    assert numbers.codes is not None and numbers.scale is not None
    outer = second(store, params, side)
    scale = spread(store, numbers.scale * outer, numbers.coded)
    if isinstance(store.code, Uniform):
        return numbers.codes * scale
    even = _step(store, numbers.coded.shape[-1])
    if even is not None:
        return numbers.codes * scale * even
    if numbers.offset is None:
        return numbers.coded
    return numbers.coded - spread(store, numbers.offset * outer, numbers.coded)


def _step(store: Store, channels: int) -> float | None:
    """The step of evenly spaced levels of a table, in vectors of `channels` numbers."""
    code = store.code
    if not isinstance(code, Codebook) or code.levels == "calibrated":
        return None
    assert store.measure is not None
    block = store.measure.block.channels
    levels = table(code, block if isinstance(block, int) else channels)
    steps = {high - low for low, high in zip(levels, levels[1:], strict=False)}
    return steps.pop() if len(steps) == 1 else None


def sizes_of(
    store: Store, x: Tensor, span: tuple[int, int], params: Params, side: Side, largest: Largest, at: int = 0
) -> Tensor:
    """What each factor of `sides_of` counts in a bound on products, float64 of the same shape; of keys whose positions
    were taken off, in the space that is coded.  `at` is the position of the first token of x.

    With these sizes n, products of operands rounded to float16 are off by at most 2^-10 |q| n each:

    - Codes s*c, counted from the lowest level, are exact, and of q 2^-11 is rounded off: n = s*c/2.  In unclipped
      ranges that is at most A, the largest size in the block.  (Codes of lower planes in the same word are taken off
      again by the next plane's query.  Of w bits they add up to 2/(2^w - 1) of it, were all roundings of one sign;
      they are of either sign, and n is A for all codes, half of which lie in the lower half.)
    - Where 32 tokens or more share an fp16 scale, q is rounded, then its products with s and with the offset o:
      2 * 2^-11 of each, n = s*c + |o|.
    - Two sketches of masked vectors: of the others' codes as if they were of all channels, and what either says at the
      chosen ones, whose map is rounded, then it itself, and the query: n = 2 |W| |s*level| there, and the query's own.
    - Levels of tables, s*level, are rounded to float16 as q is, 2 * 2^-11: n = s*|level|, without an offset.
    - Decoded numbers are rounded as q is: n = |x^|.  So are exact ones.  What is in polar
      coordinates counts as its radius.
    """
    if stretches := pieces(store, x):
        return torch.cat([sizes_of(one, part, span, params, side, largest, at) for one, part in stretches], -1)
    first, end = span
    x = x.double()
    exact = x.abs()
    part = x.new_zeros(*x.shape[:3], sum(_widths(store, x.shape[3], sizes=True)))
    if end > first:
        rows = x[:, :, first:end]
        terms = terms_of(store, rows, params, side, at + first)
        parts = [_sizes(term, largest, roped=store.rope is not None) for term in terms]
        size = torch.cat(parts, -1)
        part[:, :, first:end] = size
        exact[:, :, first:end] = 0 if store.apart else size
    return torch.cat((part, exact), -1) if store.apart else exact


def _sizes(term: TermOf, largest: Largest, *, roped: bool) -> Tensor:
    """`sizes_of` of one term; `roped`: of keys whose positions were taken off."""
    store, found, params = term.store, term.kept.coded, term.params
    assert params is not None
    if isinstance(store.code, LowRank):
        return _met(store, low_rank.sizes(term.kept))
    if isinstance(store.code, Sparse):
        return found.abs()
    if isinstance(store.code, Chosen):  # n = s*c, or a float16 number, whose query is rounded once
        return term.kept.decoded.abs()
    coded = encoded_rows(store, term.x, params, term.place).double()
    if _masked(term):
        return _masked_sizes(term, found.abs(), params)
    if isinstance(store.code, Bands) and store.code.channels:
        parts = []
        for one in stretches(store, coded):
            bare = Store(one.store.code, scale=one.store.scale)
            parts.append(_of_numbers(bare, one.numbers, one.kept(term.kept), term, largest, roped))
        size = torch.cat(parts, -1)
    else:
        size = _of_numbers(store, coded, term.kept, term, largest, roped)
    if store.polar:
        turns = 2**store.levels
        size = size[..., : size.shape[-1] // turns].repeat(1, 1, 1, turns)
    return _carried(store, size, found, term.x.shape[3], params) if roped else _met(store, size)


def _of_numbers(store: Store, coded: Tensor, kept: Quantized, term: TermOf, largest: Largest, roped: bool) -> Tensor:
    """`sizes_of` of numbers (1, H, T, M) of the coded space under one scale, in that space."""
    params, found = term.params, kept.coded
    assert params is not None
    counted = isinstance(store.code, Uniform) or _step(store, coded.shape[-1]) is not None
    signed = _factors(store, kept, params, term.place)
    factors = signed.abs() / (2 if counted else 1)
    if counted and not roped and _rescaled(store):
        factors = signed.abs() + (found - signed).abs()
    return torch.stack((largest(store, coded, params), found.abs(), factors)).amax(0)


def _masked(term: TermOf) -> bool:
    """Whether it is a sketch of vectors that have zeros where another one looks."""
    return isinstance(term.store.code, Sketch) and term.mine is not None


def _unmapped(term: TermOf, numbers: Tensor, params: Params) -> Tensor:
    """Coded numbers (1, H, T, M) of a masked vector as those of its channels (1, H, T, D)."""
    assert term.mine is not None
    found = maps(term.store, term.x.shape[3], term.x.shape[1], params, term.place)
    assert found is not None
    return torch.where(term.mine, applied(found[2], numbers), 0.0)


def _masked_sizes(term: TermOf, levels: Tensor, params: Params) -> Tensor:
    """`sizes_of` of a sketch of masked vectors: of its codes, if it is that of the others, and of chosen channels."""
    found = maps(term.store, term.x.shape[3], term.x.shape[1], params, term.place)
    assert found is not None and term.mine is not None
    top = term.kept.channels is not None
    there = torch.where(term.mine == top, 2 * applied(found[2].abs(), levels), 0.0)
    return torch.cat((levels * (0 if top else 1), there), -1)


def _rescaled(store: Store) -> bool:
    """Whether a query is multiplied by scales, in float16, once for the tokens that share them."""
    scale = store.measure
    if scale is None or scale.when == "calibrated" or store.polar:
        return False
    tokens = scale.block.tokens
    return isinstance(tokens, int) and tokens % 32 == 0 and scale.dtype == "fp16" and scale.scale is None


def _carried(store: Store, size: Tensor, coded: Tensor, head_dim: int, params: Params) -> Tensor:
    """Sizes of keys that are mapped back in the loop, before their positions: y and W are rounded for one product, its
    sum for the next, so n = |W| |y| + |W y + v|; numbers of W below the normal ones of float16 are off by 2^-25."""
    found = maps(store, head_dim, coded.shape[1], params, "keys")
    if found is None:
        return size
    _, _, w, v = found
    before = (applied(w, coded) + v[:, None]).abs()
    return applied(w.abs() + 2.0**-15, size) + before


def mapped_query(store: Store, q: Tensor, heads: int, params: Params, *, sizes: bool = False) -> Tensor:
    """What multiplies the factors of keys: q (B, Hq, Q, D), or with W^T q before it (q again for every term where
    positions are put back on decoded keys, or vectors are masked); or their `sizes`."""
    if store.rope is not None:
        return q.double().repeat(1, 1, 1, len(store.placed("keys")) + 1)
    if not store.apart:
        return q.double()
    met = []
    for place, term in store.placed("keys"):
        found, masked = maps(term, q.shape[3], heads, params, place), isinstance(term, Parted) and term.masked
        if found is not None and (sizes or not masked):
            decode = by_head(found[2], heads, term.joined).expand(heads, -1, -1)
            met.append(q.double() @ decode.repeat_interleave(q.shape[1] // heads, 0))
        if found is None or masked:
            met.append(q.double())
    return torch.cat((*met, q.double()), -1)


def query_sizes(store: Store, q: Tensor, heads: int, params: Params) -> Tensor:
    """What multiplies `sizes_of` in a bound on scores: sizes of `mapped_query`.

    Of keys whose positions were taken off, the length of the query's rotary pair, since a product is with R_t^T q or
    with the same split into cosines and sines: |q_a cos| + |q_b sin| is at most |(q_a, q_b)|."""
    mapped = mapped_query(store, q, heads, params, sizes=True).abs()
    if store.rope is None:
        return mapped
    *coded, exact = mapped.split(q.shape[3], -1)
    lengths = [(one.square() + partners(store, one, params).square()).sqrt() for one in coded]
    return torch.cat((*lengths, exact), -1)


def rounded_sizes(scheme: Scheme, q: Tensor, heads: int, params: Params) -> Tensor:
    """The same of a scheme that may round queries: the larger of what a number of the query is, and is rounded to."""
    sizes = query_sizes(scheme.keys, q, heads, params)
    if scheme.queries is None:
        return sizes
    met = rounded(scheme, q, heads, params).abs()
    return torch.maximum(sizes, torch.nn.functional.pad(met, (0, sizes.shape[3] - met.shape[3])))


def product_errors(store: Store, backend: Backend, q: Tensor, held: Tensor, sizes: Tensor, size: Tensor) -> Tensor:
    """How far products of q (B, Hq, Q, D) with held keys (B, Hq, D, T) may be off, float64 (B, Hq, Q, T), `sizes` those
    of the query (`query_sizes`), `size` (B, Hq, T, M) those of the keys (`sizes_of`): three kinds of rounding.

    Of operands to float16: 2^-10 of the products' sizes.  A query is divided by its row's largest number first; below
    2^-14 of that, 2^-7 in the highest plane of a word, float16 is off by 2^-25, there 2^-18, of it instead, times codes
    of up to twice a size.  Of keys behind their positions more are rounded (`roundings`).  The torch kernels round
    none: their operands are float32.
    Of sums in float32, n numbers of a vector and a handful of factors and sums behind them: n + 8 times 2^-24 of q*s*c
    and q*o, of sizes up to 3 |q| A together, and of what a shift of the keys adds.
    """
    products, tiny = sizes @ size.transpose(2, 3), sizes.amax(-1, keepdim=True) * size.sum(-1)[:, :, None]
    summed = (size.shape[-1] + 8) * 2.0**-24 * (3 * products + q.double().abs() @ held.abs())
    operands = roundings(store, backend) * 2.0**-11
    return summed + (operands * products + 2.0**-17 * tiny if backend == "triton" else 0.0)


def mapped_back(store: Store, part: Tensor, head_dim: int, params: Params) -> Tensor:
    """The factors of values as parts of the output's channels: (1, H, T, D)."""
    if not store.apart:
        return part
    spaces = store.placed("values")
    *coded, total = part.split([*_widths(store, head_dim), head_dim], -1)
    for (place, term), numbers in zip(spaces, coded, strict=True):
        found = maps(term, head_dim, part.shape[1], params, place)
        total = total + (numbers if found is None else numbers @ by_head(found[2], part.shape[1], term.joined).mT)
    return total
