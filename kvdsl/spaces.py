"""The space that a store codes in: what transforms and a sketch make of a head's vector, as one affine map each way.

Polar coordinates come behind the map, and are undone on decoded numbers before it.

A chain of transforms, or a sketch, takes a vector x of D channels to y = E x - u of M numbers, which is coded; a coded
y is read as x = W y + v.  Scores and outputs never need x: q.x = (W^T q).y + q.v, and sum_t p_t x_t = W sum_t p_t y_t
+ v sum_t p_t, so that W is applied once to a query, or once to an output.

Where G neighbouring heads are rotated together, what is coded of a head is a map of all their vectors, one behind the
other, and a head is read from what is coded of all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from .errors import ShapeError
from .matrices import product, rotation, sketch, start
from .scheme import (
    ALL,
    ChannelScale,
    ChannelShift,
    Eigenbasis,
    LowRank,
    Permute,
    Pick,
    PreRope,
    Rotate,
    Side,
    Sketch,
    Sparse,
    Store,
    TopChannels,
)

Params = Mapping[str, Tensor]
Map = tuple[Tensor, Tensor]  # matrix (heads or 1, out, in) and shift (heads or 1, out), float64


def calibrated(store: Store, side: Side, heads: int, head_dim: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the transforms' numbers that come with the parameters: (kv heads, head_dim) each, of a basis
    (kv heads or 1, head_dim, head_dim), and of one that is no rotation, with its inverse, (kv heads or 1, 2, head_dim,
    head_dim), of PreRope the model's (head_dim / 2) frequencies, or fewer; which channels are
    outliers, (kv heads, so many), or the thresholds of single numbers, (2, kv heads, head_dim), come before."""
    found: dict[str, tuple[int, ...]] = {}
    if isinstance(store.outliers, Sparse) and store.outliers.when == "calibrated":
        found[f"{side}.outliers"] = (2, heads, head_dim)
    for name, part in store.own.numbered(side):
        if isinstance(part, Pick):
            others = part.width(head_dim)
            found[name], head_dim = (heads, head_dim - others), others
        elif isinstance(part, Eigenbasis):
            pair = (2,) if part.matrices == 2 else ()
            found[name] = (heads if part.per == "head" else 1, *pair, head_dim, head_dim)
            head_dim = part.width(head_dim)
        elif not isinstance(part, Rotate):
            found[name] = (head_dim // 2,) if isinstance(part, PreRope) else (heads, head_dim)
    return found


def maps(
    store: Store, side: Side, heads: int, head_dim: int, params: Params, device: torch.device | str
) -> dict[str, Tensor]:
    """`<side>.encode` E (heads or 1, M, D) and `<side>.decode` W (heads or 1, D, M), float32; with a shift also
    `<side>.encode_shift` -u (heads or 1, M) and `<side>.decode_shift` v (heads or 1, D), which are added.  Given ones
    are taken as they are.  Of G heads that are rotated together E is (heads, M, G D) and W (heads, D, G M).

    Empty for a store that codes the vector itself.  Rotary positions, which no one matrix takes off, are off before it.
    Of what is left the same under `<side>.residual.`, of outlier channels under `<side>.outliers.store.`, and
    `<side>.read`, (heads or 1, D, M + M' ...): W of all terms side by side.  Of vectors of low rank `<side>.start`, the
    first of the iteration that finds them, (rank, D).
    """
    found = dict[str, Tensor]()
    for place, term in store.placed(side):
        found |= _maps(term, place, heads, head_dim, params, device)
        if isinstance(term.code, LowRank):
            first = start(term.code.rank, head_dim, term.code.seed)
            found[f"{place}.start"] = first.to(device, torch.float32)
    if len(store.placed(side)) > 1:
        found[f"{side}.read"] = _side_by_side(store, side, head_dim, found, device)
    return found


def _side_by_side(store: Store, side: Side, head_dim: int, found: Params, device: torch.device | str) -> Tensor:
    """What takes a row, the coded numbers of terms one behind the other, to a vector."""
    same = torch.eye(head_dim, device=device)[None]
    rows = zip(store.placed(side), store.rows(side), strict=True)
    parts = [found.get(f"{place}.decode", same) for (place, _), row in rows if row]
    heads = max(len(part) for part in parts)
    return torch.cat([part.expand(heads, -1, -1) for part in parts], -1).contiguous()


def _maps(
    store: Store, path: str, heads: int, head_dim: int, params: Params, device: torch.device | str
) -> dict[str, Tensor]:
    """The maps of one term, whose numbers are named by its path."""
    if not store.mapped:
        return {}
    names = [f"{path}.{name}" for name in ("encode", "decode", "encode_shift", "decode_shift")]
    if names[0] in params and names[1] in params:
        return {name: params[name].to(device, torch.float32).contiguous() for name in names if name in params}
    numbers = tuple(None if isinstance(part, PreRope) else params.get(name) for name, part in store.numbered(path))
    if any(given is not None for given in numbers):
        found = _composed(store, heads, head_dim, numbers)
    else:
        found = _fixed(store, heads if store.joined > 1 else 1, head_dim, str(device))
    kept = names if store.shifted else names[:2]
    return {name: tensor.to(device) for name, tensor in zip(kept, found, strict=False)}


@cache
def _fixed(store: Store, heads: int, head_dim: int, device: str) -> tuple[Tensor, ...]:
    """Maps that a seed alone gives: the layers of a model share them."""
    empty = (None,) * len(store.linear)
    return tuple(tensor.to(device) for tensor in _composed(store, heads, head_dim, empty))


def _composed(store: Store, heads: int, head_dim: int, numbers: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """(E, W, -u, v) in float32: products formed in float64 and rounded once."""
    together = store.joined
    channels = together * head_dim
    forth: Map = (torch.eye(channels, dtype=torch.float64)[None], torch.zeros(1, channels, dtype=torch.float64))
    back: Map = forth
    for part, given in zip(store.linear, numbers, strict=True):
        there, here = _step(part, head_dim, together, given)
        head_dim = part.width(head_dim) if isinstance(part, (Pick, Eigenbasis)) else head_dim
        forth = _after(there, forth)
        back = _after(back, here)
    if isinstance(store.code, Sketch):
        rows = sketch(store.coded(head_dim), head_dim, store.code.basis, store.code.seed)[None]
        forth = _after((rows, rows.new_zeros(1, rows.shape[1])), forth)
        back = _after(back, (rows.mT, rows.new_zeros(1, head_dim)))
    found = [forth[0], back[0], forth[1], back[1]]
    if together > 1:  # of all heads that are rotated together, to rows of each head
        found = [x.expand(heads // together, *x.shape[1:]).reshape(heads, -1, *x.shape[2:]) for x in found]
    return tuple(x.to(torch.float32).contiguous() for x in found)


def applied(matrix: Tensor, x: Tensor) -> Tensor:
    """A map (H or 1, out, G in) of x (B, H, T, in), the vectors of G heads one behind the other: (B, H, T, out).

    Entries of one size, as a Hadamard matrix has, multiply the sums: numbers that cancel leave nothing.
    """
    size = matrix.abs().max()
    if bool(((matrix == 0) | (matrix.abs() == size)).all()) and bool(size != 1):
        return applied(matrix.sign(), x) * size
    together = matrix.shape[2] // x.shape[3]
    if together == 1:
        return x @ matrix.mT
    whole = x.unflatten(1, (-1, together)).transpose(2, 3).flatten(3)
    rows = matrix.unflatten(0, (-1, together)).flatten(1, 2)
    return (whole @ rows.mT).unflatten(3, (together, -1)).transpose(2, 3).flatten(1, 2)


def refuse_others(store: Store, side: Side, head_dim: int, made: Params) -> None:
    """ShapeError for a map that stands for a Hadamard rotation and is not one: kernels take its sums."""
    for place, term in store.placed(side):
        size = term.hadamard(head_dim)
        if not size or term.joined > 1:
            continue
        encode, decode = made[f"{place}.encode"], made[f"{place}.decode"]
        (rotate,) = (part for part in term.linear if isinstance(part, Rotate))
        right = rotation("hadamard", size, None, head_dim).to(encode.device, torch.float32)
        same = encode.shape[1:] == right.shape and torch.equal(decode, encode.mT)
        if same and rotate.kind == "random_hadamard":
            first = torch.arange(head_dim, device=encode.device) // size * size
            right = right * encode.gather(1, first[None, None, :].expand(len(encode), 1, -1)).sign()
        if not same or not torch.equal(encode, right.expand_as(encode)):
            raise ShapeError(_other(f"{place}.decode", rotate))
    top = store.outliers if isinstance(store.outliers, TopChannels) and store.outliers.online else None
    if top is not None and isinstance(store.code, Sketch) and top.store.code == store.code:
        one, other = (made.get(f"{side}{place}.decode") for place in ("", ".outliers.store"))
        if one is not None and other is not None and not torch.equal(one, other):
            fact = f"params['{side}.outliers.store.decode']: another matrix than that of the others, {store.code!r}"
            raise ShapeError(f"{fact}, which is one sketch; give the same, or another seed")


def _other(name: str, transform: object) -> str:
    """What is said of a given map that is not the one which kernels take it for."""
    fact = f"params[{name!r}]: another matrix than the transform's {transform!r}"
    return f"{fact}, for which kernels take it; leave it out, or use Rotate('orthogonal', seed=0)"


def in_loop(store: Store, side: Side, heads: int, head_dim: int, made: Params, *, exact: bool) -> dict[str, Tensor]:
    """What maps back in the loop over tokens, of keys behind their rotary positions: W[d, m] = outer[d] * inner[m, d],
    of G heads that are rotated together m a number of any.

    A factor of each channel of the head goes onto the query, so the rows of W are made alike: `<side>.inner` (heads or
    1, G M, D), float16 or, if `exact`, float32, `<side>.outer` (heads, D) and, with a shift v, `<side>.inner_shift`
    v / outer, float32.  Rows of `inner` are as long as W's longest, or up to twice shorter, since `outer` are powers of
    two; of a Hadamard map `inner` is Sylvester's matrix times a power of two, and `outer` has its signs.  Where each
    number is one channel's, there is no `inner`, but its place: see `_channelwise`.  ShapeError for a given map that is
    not of the kind which kernels take it for.
    """
    if store.rope is None or not store.mapped:
        return {}
    if store.channelwise:
        return _channelwise(store, side, heads, made)
    w, size = made[f"{side}.decode"], store.hadamard(head_dim)
    if size:
        first = torch.arange(head_dim, device=w.device) // size * size
        power = 2.0 ** math.ceil(math.log2(size) / 2)
        outer = w.gather(2, first[None, :, None].expand(w.shape[0], -1, 1))[..., 0] * power
        inner = (w / outer[..., None]).mT
        if store.joined > 1:
            sylvester = rotation("hadamard", size, None, w.shape[2]).sign().to(w.device, torch.float32) / power
            rows = inner.mT.reshape(-1, *sylvester.shape)
            if not torch.equal(rows, sylvester.expand_as(rows)):
                raise ShapeError(_other(f"{side}.decode", store.linear[1]))
    else:
        lengths = w.double().norm(dim=2)
        lengths = lengths / lengths.amax(1, keepdim=True).clamp(min=2.0**-126)
        outer = torch.exp2(lengths.clamp(min=2.0**-100).log2().ceil()).to(torch.float32)
        inner = (w / outer[..., None]).mT
    found = {f"{side}.inner": inner.to(torch.float32 if exact else torch.float16).contiguous()}
    found[f"{side}.outer"] = outer.expand(heads, -1).contiguous()
    if store.shifted:
        found[f"{side}.inner_shift"] = (made[f"{side}.decode_shift"] / found[f"{side}.outer"]).contiguous()
    return found


def _channelwise(store: Store, side: Side, heads: int, made: Params) -> dict[str, Tensor]:
    """`in_loop` of a map whose number m is one channel's: W[d, m] = outer[m] where d = order[m], else 0.

    `<side>.order` (heads, D), int32, `<side>.outer` and, with a shift v, `<side>.inner_shift` v[order] / outer (heads,
    D), float32.  Channels that no transform puts elsewhere, or gives a factor, must keep their places, and have none.
    """
    w = made[f"{side}.decode"]
    order = w.abs().argmax(1)
    outer = w.gather(1, order[:, None])[:, 0]
    rows, places = torch.zeros_like(w).scatter(1, order[:, None], outer[:, None]), torch.arange(w.shape[1])
    right = torch.equal(rows, w) and torch.equal(order.sort(-1).values.cpu(), places.expand_as(order))
    right = right and (store.permuted or torch.equal(order.cpu(), places.expand_as(order)))
    if not right or not store.scaled and bool((outer != 1).any()):
        raise ShapeError(_other(f"{side}.decode", store.transform))
    found = {"order": order.to(torch.int32), "outer": outer}
    if store.shifted:
        found["inner_shift"] = made[f"{side}.decode_shift"].expand(heads, -1).gather(1, order.expand(heads, -1)) / outer
    return {f"{side}.{name}": tensor.expand(heads, -1).contiguous() for name, tensor in found.items()}


def _after(outer: Map, inner: Map) -> Map:
    """The map that applies `inner`, then `outer`."""
    return product(outer[0], inner[0]), product(outer[0], inner[1][..., None])[..., 0] + outer[1]


def _step(part: object, head_dim: int, together: int, given: Tensor | None) -> tuple[Map, Map]:
    """One transform and its inverse, of the vectors of so many heads one behind the other."""
    channels = together * head_dim
    zero, one = torch.zeros(1, channels, dtype=torch.float64), torch.eye(channels, dtype=torch.float64)
    if isinstance(part, PreRope):
        return (one[None], zero), (one[None], zero)
    if isinstance(part, Rotate):
        rotated = part.heads * head_dim
        size = rotated if part.size is ALL else part.size
        assert isinstance(size, (int, tuple))
        matrix = rotation(part.kind, size, part.seed, rotated)
        matrix = torch.block_diag(*[matrix] * (together // part.heads))[None]
        return (matrix, zero), (matrix.mT, zero)
    assert given is not None
    if isinstance(part, Pick):
        order = _picked(part, given.to("cpu"), head_dim)
        matrix, zeros = one[order], zero.new_zeros(1, order.shape[1])
        return (matrix, zeros), (matrix.mT, zero)
    if isinstance(part, Eigenbasis):
        rows = given.to("cpu", torch.float64)
        rows = rows if part.matrices == 2 else torch.stack([rows, rows.mT], 1)
        rows = rows.expand(together, -1, -1, -1) if len(rows) < together else rows
        kept = part.width(head_dim)
        there, back = _blocks(rows[:, 0, :kept], together), _blocks(rows[:, 1, :, :kept], together)
        return (there, zero[:, : together * kept]), (back, zero)
    numbers = given.to("cpu", torch.float64).reshape(-1, channels)
    if isinstance(part, ChannelScale):
        return (torch.diag_embed(1 / numbers), zero), (torch.diag_embed(numbers), zero)
    if isinstance(part, ChannelShift):
        return (one[None], -numbers), (one[None], numbers)
    assert isinstance(part, Permute)
    order = torch.arange(channels) // head_dim * head_dim + numbers.to(torch.int64)  # within each head
    matrix = one[order]
    return (matrix, zero), (matrix.mT, zero)


def _blocks(rows: Tensor, together: int) -> Tensor:
    """Matrices (H, M, D) of so many heads each, one behind the other."""
    return torch.stack([torch.block_diag(*some) for some in rows.split(together)])


def _picked(part: Pick, top: Tensor, head_dim: int) -> Tensor:
    """The channels that are picked, rising, of each head, of given outlier channels (H, n)."""
    return (apart(top, head_dim) == part.top).nonzero()[:, 1].reshape(len(top), -1)


def apart(top: Tensor, head_dim: int) -> Tensor:
    """Whether each channel of each head, bool (H, D), is one of the outlier channels `top` (H, n)."""
    found = torch.zeros(len(top), head_dim, dtype=torch.bool, device=top.device)
    return found.scatter(1, top.to(torch.int64), True)
