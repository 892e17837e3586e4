"""The space that is coded: a side's transforms as one affine map y = E x - u, and back, x = W y + v.

The chain is multiplied out in float64 and rounded once to float32; a number of either space is one float64 sum, rounded
once.  A sketch is such a map too, E = S and W = S^T; what it stores of y is the signs.

Where heads are rotated together, x is the vectors of neighbouring kv heads, one behind the other, and so is y.

Rotary positions come off before that, R_t^-1 x, and are put back behind it: the one map that differs by token.
Polar coordinates come behind everything else: each pair of numbers as its radius and its angle.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from kvdsl.codes import Chosen, Sketch
from kvdsl.errors import ShapeError
from kvdsl.matrices import product, rotation, sketch
from kvdsl.rope import waves
from kvdsl.scheme import Band, Store
from kvdsl.transforms import ChannelScale, ChannelShift, Eigenbasis, Permute, Pick, PreRope, Rotate

from .rounding import LARGEST_INPUT, f32

Params = Mapping[str, Tensor]
Maps = tuple[Tensor, Tensor, Tensor, Tensor]
At = int | Tensor
"""The position of the first of neighbouring tokens, or int64 (B, H, T), that of each token of each head."""


def widened(x: Tensor, name: str) -> Tensor:
    """`x` as float64 holding float32 numbers; float64 input is rounded to float32 first."""
    if x.dim() != 4:
        raise ShapeError(f"{name}: shape {tuple(x.shape)} has {x.dim()} axes; give (batch, heads, tokens, head_dim)")
    if not x.is_floating_point():
        raise ShapeError(f"{name}: dtype {x.dtype} is no float; give float16, bfloat16 or float32")
    return f32(x.detach().cpu())


def channels_of(store: Store, head_dim: int) -> int:
    """M, the channels of the coded space, of a band its own."""
    if isinstance(store, Band):
        return int(store.width(head_dim) * store.share)
    if isinstance(store.code, Sketch) and isinstance(store.code.dim, int):
        return store.code.dim
    if isinstance(store.code, Chosen):
        return store.code.choice.count(head_dim)
    return store.width(head_dim)


def maps(store: Store, head_dim: int, heads: int, params: Params | None = None, side: str = "keys") -> Maps | None:
    """(E, u, W, v), float64 holding float32: (H or 1, M, D), (H or 1, M), (H or 1, D, M), (H or 1, D); None if the side
    is coded as it is.  Of G heads that are rotated together E is (H/G or 1, G M, G D), W (H/G or 1, G D, G M), u (H, M)
    and v (H, D).

    `params` holds `<side>.transform[<i>]` of calibrated transforms, or `<side>.encode` E and `<side>.decode` W, which
    stand for the whole chain, with `<side>.encode_shift` -u and `<side>.decode_shift` v where they are not 0.  Raises
    ShapeError for those that are missing or of another shape.
    """
    if not store.mapped:
        return None
    width, together = channels_of(store, head_dim), _together(store, side, heads)
    if params is not None and f"{side}.encode" in params:
        common = together == 1
        encode = _param(params, f"{side}.encode", heads, (width, together * head_dim), "a map", common=common)
        decode = _param(params, f"{side}.decode", heads, (head_dim, together * width), "a map", common=common)
        encode = encode.reshape(-1, together * width, together * head_dim)  # rows of one head behind another's
        decode = decode.reshape(-1, together * head_dim, together * width)
        shifts = [torch.zeros(1, size, dtype=torch.float64) for size in (width, head_dim)]
        for position, (name, size) in enumerate((("encode_shift", width), ("decode_shift", head_dim))):
            if f"{side}.{name}" in params:
                shifts[position] = _param(params, f"{side}.{name}", heads, (size,), "a map", common=True)
        return encode, -shifts[0], decode, shifts[1]
    if isinstance(store.code, Sketch):
        rows = sketch(width, head_dim, store.code.basis, store.code.seed)
        e, w, u = rows[None], rows.T[None], torch.zeros(1, width, dtype=torch.float64)
    else:
        e = torch.eye(together * head_dim, dtype=torch.float64)[None]
        w, u = e, torch.zeros(1, together * head_dim, dtype=torch.float64)
    v = w.new_zeros(1, w.shape[1])
    for name, part in store.numbered(side):
        if isinstance(part, PreRope):
            continue
        if isinstance(part, Pick):
            count = Pick(part.channels, True).width(head_dim)
            given = _param(params, name, heads, (count,), "a set of outlier channels").to(torch.int64)
            is_apart = torch.zeros(heads, head_dim, dtype=torch.bool).scatter(1, given, True)
            picked = torch.stack([torch.arange(head_dim)[chosen == part.top] for chosen in is_apart])
            e = torch.nn.functional.one_hot(picked, head_dim).to(torch.float64)
            head_dim = e.shape[1]
            u, w = torch.zeros(1, head_dim, dtype=torch.float64), e.transpose(1, 2)
            continue
        if isinstance(part, Rotate):
            channels = part.heads * head_dim
            blocks = part.size if isinstance(part.size, (int, tuple)) else channels
            r = rotation(part.kind, blocks, part.seed, channels)
            r = torch.block_diag(*[r] * (together // part.heads))
            e, u, w = product(r, e), product(u[:, None], r.T)[:, 0], product(w, r.T)
            continue
        if isinstance(part, Eigenbasis):
            count = 1 if part.per == "layer" else heads
            if part.by == "balanced":
                t = _param(params, name, count, (2, head_dim, head_dim), "a basis").expand(heads, -1, -1, -1)
            else:
                t = _param(params, name, count, (head_dim, head_dim), "a basis").expand(heads, -1, -1)
                t = torch.stack([t, t.mT], 1)
            head_dim = part.width(head_dim)  # those behind it are read as 0
            kept = (t[:, 0, :head_dim], t[:, 1, :, :head_dim])
            r, back = (torch.stack([torch.block_diag(*some) for some in m.split(together)]) for m in kept)
            e, u, w = product(r, e), product(r, u[..., None])[..., 0], product(w, back)
            continue
        given = _param(params, name, heads, (head_dim,), "a calibrated transform")
        if isinstance(part, Permute):  # within each head
            given = given + torch.arange(heads)[:, None] % together * head_dim
        given = given.reshape(heads // together, together * head_dim)
        if isinstance(part, ChannelScale):
            e, u, w = e / given[..., None], u / given, w * given[:, None, :]
        elif isinstance(part, ChannelShift):
            u, v = u + given, v + product(w, given[..., None])[..., 0]
        else:
            p = torch.nn.functional.one_hot(given.to(torch.int64), given.shape[1]).to(torch.float64)
            e, u, w = p @ e, (p @ u[..., None])[..., 0], w @ p.transpose(1, 2)  # one term a sum
    if together > 1:
        u, v = (x.expand(heads // together, -1).reshape(heads, -1) for x in (u, v))
    return f32(e), f32(u), f32(w), f32(v)


def _together(store: Store, side: str, heads: int) -> int:
    """Heads that are rotated together; ShapeError where they do not divide all."""
    together = math.lcm(*(part.heads for part in store.linear if isinstance(part, Rotate)))
    if heads % together:
        fact = f"{side}: {heads} heads are no whole number of {together}, which are rotated together"
        raise ShapeError(f"{fact}; give a multiple of {together}")
    return together


def joined(x: Tensor, together: int) -> Tensor:
    """x (B, H, T, D) with the vectors of neighbouring heads one behind the other: (B, H/G, T, G D)."""
    b, h, t, d = x.shape
    return x.reshape(b, h // together, together, t, d).transpose(2, 3).reshape(b, h // together, t, together * d)


def parted(y: Tensor, together: int) -> Tensor:
    """The inverse of `joined`."""
    b, h, t, d = y.shape
    return y.reshape(b, h, t, together, d // together).transpose(2, 3).reshape(b, h * together, t, d // together)


def by_head(matrix: Tensor, heads: int, together: int) -> Tensor:
    """A matrix of `maps` as rows of every head: (H, M, G D) of E, (H, D, G M) of W; as it is where G is 1."""
    if together == 1:
        return matrix
    return matrix.expand(heads // together, -1, -1).reshape(heads, -1, matrix.shape[2])


def applied(matrix: Tensor, x: Tensor) -> Tensor:
    """A matrix of `maps` times x (B, H, T, D): (B, H, T, M).

    Of a matrix whose entries are 0 or of one size the numbers are added up first, then multiplied by it: those that
    cancel leave nothing.
    """
    together = matrix.shape[2] // x.shape[3]
    size = matrix.abs().max()
    even = bool(((matrix == 0) | (matrix.abs() == size)).all())
    sums = joined(x, together) @ (matrix.sign() if even else matrix).transpose(1, 2)
    return parted(sums * size if even else sums, together)


def encoded(x: Tensor, mapped: Maps | None) -> Tensor:
    """x (B, H, T, D) in the coded space (B, H, T, M), float64 holding float32.

    Every number of a vector with a NaN is NaN, in all heads that are rotated together; numbers beyond +-65504 saturate
    before they are mapped.
    """
    if mapped is None:
        return x
    e, u, _, _ = mapped
    together = e.shape[2] // x.shape[3]
    spoiled = joined(x.isnan(), together).any(-1, keepdim=True).repeat_interleave(together, 1)
    x = torch.where(x.isnan(), torch.zeros_like(x), x).clamp(-LARGEST_INPUT, LARGEST_INPUT)
    y = f32(applied(e, x) - u[:, None, :])
    return torch.where(spoiled, torch.full_like(y, float("nan")), y)


def restored(y: Tensor, mapped: Maps | None) -> Tensor:
    """y (B, H, T, M) brought back, (B, H, T, D), float64 holding float32."""
    if mapped is None:
        return y
    _, _, w, v = mapped
    return f32(applied(w, y) + v[:, None, :])


def without_rope(store: Store, x: Tensor, params: Params | None, side: str, at: At) -> Tensor:
    """R_t^-1 x of x (B, H, T, D), whose first token stands at position t = `at`, or each at its own; x itself without
    PreRope.

    Every number of a vector with a NaN is NaN; numbers beyond +-65504 saturate before they are rotated.
    """
    if store.rope is None:
        return x
    spoiled = x.isnan().any(-1, keepdim=True)
    clean = torch.where(x.isnan(), torch.zeros_like(x), x).clamp(-LARGEST_INPUT, LARGEST_INPUT)
    return torch.where(spoiled, torch.full_like(x, float("nan")), _rotated(store, clean, params, side, at, -1))


def with_rope(store: Store, x: Tensor, params: Params | None, side: str, at: At) -> Tensor:
    """R_t x; a NaN spoils its vector."""
    if store.rope is None:
        return x
    spoiled = x.isnan().any(-1, keepdim=True)
    return torch.where(spoiled, torch.full_like(x, float("nan")), _rotated(store, x, params, side, at, 1))


def polar(store: Store, x: Tensor) -> Tensor:
    """Radius (first half) and angle in [0, 2 pi] (second half) of every pair of x (B, H, T, M), channels i and i + M/2,
    each taken in float64 and rounded once; x itself without Polar.

    Of several levels the radii are paired again, in float64: radii of the last level, then angles of the first, the
    second, ..., those behind the first in [0, pi/2].

    Every number of a vector with a NaN is NaN; numbers beyond +-65504 saturate, and a zero has no sign.
    """
    if not store.polar:
        return x
    spoiled = x.isnan().any(-1, keepdim=True)
    clean = torch.where(x.isnan(), torch.zeros_like(x), x).clamp(-LARGEST_INPUT, LARGEST_INPUT) + 0.0
    radius, angles = clean, []
    for _ in range(store.levels):
        a, b = radius.chunk(2, -1)
        angle = torch.atan2(b, a)
        angles.append(torch.where(angle < 0, angle + 2 * math.pi, angle))
        radius = (a * a + b * b).sqrt()
    y = f32(torch.cat((radius, *angles), -1))
    return torch.where(spoiled, torch.full_like(y, float("nan")), y)


def cartesian(store: Store, y: Tensor) -> Tensor:
    """(r cos a, r sin a) of every pair of y (B, H, T, M), radii before angles, of several levels the last one first, in
    float64 and rounded once; y itself without Polar."""
    if not store.polar:
        return y
    sizes = [y.shape[-1] >> level + 1 for level in range(store.levels)]
    radius, *angles = y.split([sizes[-1], *sizes], -1)
    for angle in reversed(angles):
        radius = torch.cat((radius * angle.cos(), radius * angle.sin()), -1)
    return f32(radius)


def _rotated(store: Store, x: Tensor, params: Params | None, side: str, at: At, sign: int) -> Tensor:
    """(a, b) -> (a cos - b sin, b cos + a sin) for every pair, one float64 sum each, rounded once; sign -1: back."""
    name, channels = f"{side}.transform[0]", x.shape[3]
    if params is None or name not in params:
        raise ShapeError(f"params[{name!r}]: missing; PreRope needs the model's frequencies, give its inv_freq")
    frequencies = params[name]
    count = len(frequencies) if frequencies.dim() == 1 else 0
    if not 1 <= count <= channels // 2:
        raise ShapeError(
            f"params[{name!r}]: shape {tuple(frequencies.shape)}; give one frequency a pair, at most {channels // 2}"
        )
    if isinstance(at, Tensor):
        last = int(at.max()) + 1 if at.numel() else 0
        cos, sin = (wave[at].to(torch.float64) for wave in waves(frequencies, 0, last))
    else:
        cos, sin = (wave.to(torch.float64) for wave in waves(frequencies, at, at + x.shape[2]))
    assert store.rope is not None
    if store.rope.interleaved:
        first, second = slice(0, 2 * count, 2), slice(1, 2 * count, 2)
    else:
        first, second = slice(0, count), slice(count, 2 * count)
    a, b, out = x[..., first], x[..., second], x.clone()
    out[..., first] = f32(a * cos - sign * (b * sin))
    out[..., second] = f32(b * cos + sign * (a * sin))
    return out


def _param(
    params: Params | None, name: str, heads: int, shape: tuple[int, ...], what: str, *, common: bool = False
) -> Tensor:
    """A parameter as float64 holding float32, one for each kv head or, where `common` allows it, one for all."""
    if params is None or name not in params:
        raise ShapeError(f"params[{name!r}]: missing; {what} of the side needs it, give its numbers")
    given = params[name]
    if tuple(given.shape) not in [(count, *shape) for count in ((1, heads) if common else (heads,))]:
        raise ShapeError(f"params[{name!r}]: shape {tuple(given.shape)}; the right one is {(heads, *shape)}")
    return f32(given.detach().cpu())
