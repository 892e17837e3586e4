"""Products of queries with what a cache holds: packed keys meet what a query is rounded to, exact ones the query."""

from __future__ import annotations

from torch import Tensor

from kvdsl.scheme import Scheme

from .quantize import Params, quantize, widened
from .rounding import f32
from .spaces import Maps, maps


def products(scheme: Scheme, q: Tensor, held: Tensor, packed: tuple[int, int], params: Params | None = None) -> Tensor:
    """q.k^ before any scaling: q (B, Hq, Q, D), held k^ (B, H, T, D) whose tokens `packed` are packed, to float64 (B,
    Hq, Q, T).

    With k^ = W y + v the map of the space that is coded, q.k^ = (W^T q).y + q.v.  Where the scheme rounds queries, what
    stands for W^T q, one float64 sum a number, rounded to float32, is what the codec makes of it, and q.v stays.
    """
    group, asked = q.shape[1] // held.shape[1], widened(q, "q")
    found = asked @ held.repeat_interleave(group, 1).transpose(2, 3)
    if scheme.queries is None or packed[0] >= packed[1]:
        return found
    mapped, rows = maps(scheme.keys, held.shape[3], held.shape[1], params), held[:, :, packed[0] : packed[1]]
    y, met = rows, rounded(scheme, q, held.shape[1], params)
    if mapped is not None:
        e, _, _, v = (part.expand(held.shape[1], *part.shape[1:]) for part in mapped)
        y = (rows - v[:, None]) @ e.transpose(1, 2)
    scores = met @ y.repeat_interleave(group, 1).transpose(2, 3)
    if mapped is not None:
        scores = scores + (asked * v.repeat_interleave(group, 0)[:, None]).sum(-1, keepdim=True)
    found[..., packed[0] : packed[1]] = scores
    return found


def rounded(scheme: Scheme, q: Tensor, heads: int, params: Params | None = None) -> Tensor:
    """What packed keys of a scheme that rounds queries meet: q (B, Hq, Q, D) for so many kv heads -> float64 (B, Hq, Q,
    M)."""
    assert scheme.queries is not None
    met = _mapped(widened(q, "q"), maps(scheme.keys, q.shape[3], heads, params), heads)
    return quantize(scheme.queries, met, None, "queries").decoded


def _mapped(q: Tensor, mapped: Maps | None, heads: int) -> Tensor:
    """W^T q, of each query head by the map of its kv head.

    Of a matrix whose entries are 0 or of one size the numbers are added up first, as the keys' are.
    """
    if mapped is None:
        return q
    w = mapped[2].expand(heads, *mapped[2].shape[1:]).repeat_interleave(q.shape[1] // heads, 0)
    size = w.abs().max()
    even = bool(((w == 0) | (w.abs() == size)).all())
    return f32((q @ w.sign()) * size if even else q @ w)
