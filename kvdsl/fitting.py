"""Transforms measured on data: outlier channels, then scales, shifts and orders of the others, one after the other as
they are applied."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import ShapeError
from .scheme import ChannelScale, ChannelShift, Eigenbasis, Permute, Side, Sparse, Store, TopChannels
from .spaces import apart, applied, maps
from .transforms import Pick

EXPONENTS = tuple(i / 20 for i in range(21))  # of the search for learned scales
DAMPING = 1e-4  # of a moment's mean diagonal
LEAST = 2.0**-14  # of a channel's scale: a channel of zeros is left as it is


def fitted(
    store: Store, side: Side, x: Tensor, q: Tensor | None, given: dict[str, Tensor] | None = None, at: int = 0,
    k: Tensor | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """The numbers of every calibrated transform, float32 (H, D), of a basis (H or 1, D, D), from x (B, H, T, D),
    queries q (B, Hq, Q, D) and, of values, their keys k (B, H, T, D).

    `given` holds the frequencies of rotary positions where they come off first; the first token stands at `at`.
    `learned` scales are max|x|^a with the exponent a, one a head, under which the store codes the data with the least
    squared error; `learned` shifts are the middle of the range.  Raises ShapeError where `balance`, a basis by
    attention, or an order by energy has no queries.
    """
    from .reference.quantize import encoded_rows

    found: dict[str, Tensor] = dict(given or {})
    if store.split is not None:
        top = largest(store.split, x)
        x, whole, q = without(top, x), q, None if q is None else without(top, q)
        rest = fitted(store.with_(outliers=None), side, x, q if side == "keys" else whole, found, at, k)
        return {f"{side}.outliers": top.to(torch.float32), **rest}
    seen: tuple[object, ...] = ()
    bare = x if store.rope is None else encoded_rows(store.with_(transform=store.rope), x, found, side, at)
    for position, part in enumerate(store.transform):  # type: ignore[arg-type]
        name = f"{side}.transform[{position}]"
        y = _through(store, side, seen, found, bare)
        if isinstance(part, ChannelScale):
            found[name] = _scales(store, side, part, seen, found, x, y, q, at)
        elif isinstance(part, Eigenbasis):
            found[name] = _basis(part, side, y, _queries(part, seen, side, x, q, k, found), k)
        elif isinstance(part, ChannelShift):
            low, high = y.amin((0, 2)), y.amax((0, 2))
            found[name] = y.mean((0, 2)) if part.by == "mean" else (low + high) / 2
        elif isinstance(part, Permute):
            found[name] = _order(part, y, _queries(part, seen, side, x, q, k, found)).to(torch.float32)
        seen = (*seen, part)
    return {name: numbers.to(torch.float32) for name, numbers in found.items()}


class Seen(NamedTuple):
    """What a store's transforms and codes see of x (B, H, T, D): x itself, or with other numbers in the places of
    single ones, float32.

    single   which those are, bool of x's shape, where any are taken out
    given    the parameters, with the thresholds of single numbers; behind PreRope x is without positions then, and
             frequencies of 0 take none off again
    """

    x: Tensor
    single: Tensor | None
    given: dict[str, Tensor]


def without_single(store: Store, side: Side, x: Tensor, given: dict[str, Tensor], at: int = 0) -> Seen:
    """x (B, H, T, D), its first token at position `at`, as the store's transforms and codes see it.

    Online, all whole blocks of tokens are without single numbers that have a slot, and without chosen channels that are
    kept in fp16.  Of calibrated thresholds none are left, so that what the codes are fitted to ends at them: those
    without a slot saturate.
    """
    code = store.outliers
    if isinstance(code, TopChannels) and code.online:
        return Seen(*_without_chosen(code, x.to(torch.float32)), given)
    if not isinstance(code, Sparse):
        return Seen(x, None, given)
    from .reference.quantize import encoded_rows
    from .reference.sparse import beyond, pick

    x, given = x.to(torch.float32), dict(given)
    if store.rope is not None:
        x = encoded_rows(Store(transform=store.rope), x, given, side, at)
        name = f"{side}.transform[0]"
        given[name] = torch.zeros_like(given[name])
    if code.when == "calibrated":
        given[f"{side}.outliers"] = thresholds(code, x)
        single, fill = beyond(x.double(), code, given[f"{side}.outliers"])
        return Seen(torch.where(single, fill, x.double()).to(torch.float32), single, given)
    whole = x.shape[2] // code.tokens * code.tokens
    single = torch.zeros_like(x, dtype=torch.bool)
    if whole:
        picked = pick(x[:, :, :whole].double(), code, side)
        x = torch.cat([picked.filled.to(torch.float32), x[:, :, whole:]], 2)
        single[:, :, :whole] = picked.kept
    return Seen(x, single, given)


def _without_chosen(code: TopChannels, x: Tensor) -> tuple[Tensor, Tensor]:
    """x (B, H, T, D) with 0 in the channels that are chosen in its whole blocks of tokens, and which numbers these
    are."""
    from .reference.chosen import among, choose

    whole = x.shape[2] // code.tokens * code.tokens
    theirs = torch.zeros_like(x, dtype=torch.bool)
    if whole:
        theirs[:, :, :whole] = among(choose(x[:, :, :whole].double(), code), code, x.shape[3])
    return torch.where(theirs, 0.0, x), theirs


def thresholds(code: Sparse, x: Tensor) -> Tensor:
    """Those numbers of every channel of x (B, H, T, D) beyond which its share lies, half of it at either end, between
    two of them in proportion: float32 (2, H, D), rounded to float16."""
    rising = x.float().clamp(-65504, 65504).transpose(0, 1).flatten(1, 2).sort(1).values.double()
    last = rising.shape[1] - 1
    place = code.share / 2 * last
    inner, outer = math.ceil(place), math.floor(place)
    ends = (rising[:, outer].lerp(rising[:, inner], place - outer),
            rising[:, last - outer].lerp(rising[:, last - inner], place - outer))  # fmt: skip
    return torch.stack(ends).to(torch.float16).to(torch.float32).cpu()


def largest(part: TopChannels, x: Tensor) -> Tensor:
    """The largest channels of every head of x (B, H, T, D), rising: int64 (H, n)."""
    size, count = x.double().abs(), Pick(part.n, True).width(x.shape[3])
    if part.by == "absmax":
        size = size.amax((0, 2))
    else:
        size = size.mean((0, 2)) if part.by == "absmean" else size.square().sum((0, 2))
    return size.argsort(dim=-1, descending=True, stable=True)[:, :count].sort(-1).values


def without(top: Tensor, x: Tensor) -> Tensor:
    """x (B, H', T, D) without the channels `top` (H, n) of its heads, or of the kv heads that its heads read."""
    kept = (~apart(top, x.shape[3])).repeat_interleave(x.shape[1] // len(top), 0)
    return x.transpose(1, 2)[:, :, kept].unflatten(2, (x.shape[1], -1)).transpose(1, 2)


def _through(store: Store, side: Side, parts: tuple[object, ...], numbers: dict[str, Tensor], x: Tensor) -> Tensor:
    """x, without positions if they come off first, after the first parts of the chain, float64."""
    part = Store(transform=parts)  # type: ignore[arg-type]
    if not part.mapped:
        return x.double()
    made = maps(part, side, x.shape[1], x.shape[3], numbers, "cpu")
    y = applied(made[f"{side}.encode"].double(), x.double())
    shift = made.get(f"{side}.encode_shift")
    return y if shift is None else y + shift[:, None].double()


def _scales(
    store: Store, side: Side, part: ChannelScale, seen: tuple[object, ...], numbers: dict[str, Tensor], x: Tensor,
    y: Tensor, q: Tensor | None, at: int,
) -> Tensor:  # fmt: skip
    size = y.abs().amax((0, 2)).clamp(min=LEAST)
    if part.by == "absmax":
        return size
    if part.by == "sqrt_absmax":
        return size.sqrt()
    if part.by == "balance":
        if q is None:
            raise ShapeError("q: missing; 'balance' weighs keys against queries, give q=")
        turned = q.double().unflatten(1, (x.shape[1], -1)).flatten(2, 3)
        if seen:
            turned = _met(Store(transform=seen), side, turned, numbers)  # type: ignore[arg-type]
        return (size / turned.abs().amax((0, 2)).clamp(min=LEAST)).sqrt()
    return _learned(store, side, len(seen), numbers, x, size, at)


def _met(store: Store, side: Side, q: Tensor, numbers: dict[str, Tensor]) -> Tensor:
    """What meets the numbers that are coded of each head, of queries (B, H, Q, D): (B, H, Q', D).  Those of heads that
    are rotated together meet the queries of all of them."""
    together = store.joined
    met = q @ maps(store, side, q.shape[1], q.shape[3], numbers, "cpu")[f"{side}.decode"].double()
    return met.unflatten(1, (-1, together)).unflatten(-1, (together, -1)).movedim(4, 2).flatten(3, 4).flatten(1, 2)


def _learned(
    store: Store, side: Side, position: int, numbers: dict[str, Tensor], x: Tensor, size: Tensor, at: int
) -> Tensor:
    """max|x|^a: the best exponent of each head, or of heads that are rotated together."""
    from .reference.quantize import quantize

    name = f"{side}.transform[{position}]"
    chain = store.with_(transform=store.transform[: position + 1])  # type: ignore[index]
    best, least = size**0, torch.full((x.shape[1],), torch.inf, dtype=torch.float64)
    for exponent in EXPONENTS:
        tried = (size**exponent).to(torch.float32)
        decoded = quantize(chain, x, {**numbers, name: tried}, side, at).decoded
        error = (decoded - x.double()).square().sum((0, 2, 3))
        error = error.unflatten(0, (-1, chain.joined)).sum(1).repeat_interleave(chain.joined)
        best = torch.where((error < least)[:, None], tried.double(), best)
        least = torch.minimum(error, least)
    return best


def _order(part: Permute, y: Tensor, q: Tensor | None) -> Tensor:
    """Channels of every head of y (B, H, T, D) by their measure, int64 (H, D); those of a pair side by side."""
    if part.by == "energy":
        assert q is not None
        size = (y.square().mean((0, 2)) + q.square().mean((0, 2))) / 2
    else:
        size = y.amax((0, 2)) - y.amin((0, 2)) if part.by == "range" else y.sum((0, 2))
    if part.pairs is None:
        return size.argsort(dim=-1, stable=True)
    first = torch.arange(size.shape[1]).unflatten(0, (2, -1) if part.pairs == "halves" else (-1, 2))
    pairs = first.mT if part.pairs == "halves" else first  # (D/2, 2)
    return pairs[size[:, pairs].sum(-1).argsort(dim=-1, stable=True)].flatten(1)


def _queries(
    part: Eigenbasis | Permute, seen: tuple[object, ...], side: Side, x: Tensor, q: Tensor | None, k: Tensor | None,
    numbers: dict[str, Tensor],
) -> Tensor | None:  # fmt: skip
    """The queries of each kv head, (B, H, Q, D), behind the maps before a basis, or an order, of keys; None where none
    are asked."""
    if part.by not in ("attention", "energy", "balanced") or part.by == "balanced" and side == "values":
        return None
    if q is None or side == "values" and k is None:
        what = "an order by energy" if part.by == "energy" else f"a basis by {part.by}"
        raise ShapeError(f"q: missing; {what} is of the queries that meet the keys, give q=")
    turned = q.double().unflatten(1, (x.shape[1], -1)).flatten(2, 3)
    return _met(Store(transform=seen), side, turned, numbers) if seen and side == "keys" else turned  # type: ignore


def _basis(part: Eigenbasis, side: Side, y: Tensor, q: Tensor | None, k: Tensor | None) -> Tensor:
    """The eigenvectors as rows, (H or 1, D, D), each with its largest number above 0, of y (B, H, T, D); or T and T^-1,
    (H or 1, 2, D, D), where two moments are balanced."""
    if part.by == "balanced":
        return _balanced(_moment(y), None if q is None else _moment(q), part.per)
    moment = _moment(y if q is None or side == "values" else q)
    if q is not None and side == "values":
        assert k is not None
        rows = k.double()
        weight = (rows @ _moment(q) * rows).sum(-1, keepdim=True)
        moment = _moment(y * (weight / weight.sum((0, 2), keepdim=True).clamp(min=2.0**-900)).sqrt())
    moment = moment.mean(0, keepdim=True) if part.per == "layer" else moment
    vectors = torch.linalg.eigh(moment).eigenvectors.flip(-1).mT
    largest = vectors.gather(-1, vectors.abs().argmax(-1, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0)


def _balanced(own: Tensor, other: Tensor | None, per: str) -> Tensor:
    """T and T^-1 under which both moments, (H, D, D) each, are the same diagonal, the largest first: (H or 1, 2, D, D),
    each row of T with its largest number above 0.  `other`: None for one of numbers that all weigh alike."""
    one = torch.eye(own.shape[-1], dtype=own.dtype)
    other = one[None] if other is None else other
    own, other = (_full(x.mean(0, keepdim=True) if per == "layer" else x) for x in (own, other))
    root = torch.linalg.cholesky(own)
    squares, vectors = torch.linalg.eigh(root.mT @ other @ root)
    lengths = squares.flip(-1).clamp(min=2.0**-900).sqrt()  # S
    inverse = torch.linalg.solve_triangular(root, one.expand_as(root), upper=False)
    there = lengths.sqrt()[..., None] * (vectors.flip(-1).mT @ inverse)
    back = root @ vectors.flip(-1) / lengths.sqrt()[:, None]
    size = (own.diagonal(dim1=1, dim2=2).sum(-1) / lengths.sum(-1)).sqrt()[:, None, None]
    largest = there.gather(-1, there.abs().argmax(-1, keepdim=True))
    factor = size * torch.where(largest < 0, -1.0, 1.0)  # (H or 1, D, 1)
    return torch.stack([there * factor, back / factor.mT], 1)


def _full(moment: Tensor) -> Tensor:
    """A moment of full rank: that of few vectors, or of channels that are never used, with a little of every channel
    added."""
    size = moment.diagonal(dim1=1, dim2=2).mean(-1).clamp(min=2.0**-900)
    return moment + DAMPING * size[:, None, None] * torch.eye(moment.shape[-1], dtype=moment.dtype)


def _moment(x: Tensor) -> Tensor:
    """sum x x^T over the vectors of every head of x (B, H, T, D): float64 (H, D, D)."""
    rows = x.double().transpose(0, 1).flatten(1, 2)
    return rows.mT @ rows
