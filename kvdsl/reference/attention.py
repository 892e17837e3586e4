"""The three questions one asks of a scheme: what is left of the keys and values, of the scores, of the attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvdsl.errors import ShapeError
from kvdsl.scheme import Scheme

from .quantize import Params, widened
from .queries import products
from .timeline import contents, packed_tokens, whole_sequence


def roundtrip(
    scheme: Scheme, k: Tensor, v: Tensor, *, window: bool = True, params: Params | None = None
) -> tuple[Tensor, Tensor]:
    """(k^, v^), float64 (B, H, T, D) each: what a cache holds of k and v (B, H, T, D) once appended and flushed.

    `window=False` leaves the window and the sinks out: every token is quantized, T must be whole blocks.  Of a scheme
    with layers, its own stores are used.  Raises ShapeError naming the tensor, its shape and the right one.
    """
    _pair(k, v)
    packed = whole_sequence(scheme, k.shape[2], window=window)
    return (
        contents(scheme.keys, k, packed["keys"], params, "keys"),
        contents(scheme.side("values"), v, packed["values"], params, "values"),
    )


def scores(scheme: Scheme, q: Tensor, k: Tensor, *, window: bool = True, params: Params | None = None) -> Tensor:
    """q.k^ before any scaling or mask: q (B, Hq, Q, D), k (B, H, T, D) -> float64 (B, Hq, Q, T).

    Query head h reads kv head h // (Hq / H).  `window` and `params` as in `roundtrip`; raises ShapeError.
    """
    _grouped(q, k)
    packed = whole_sequence(scheme, k.shape[2], window=window)["keys"]
    return products(scheme, q, contents(scheme.keys, k, packed, params, "keys"), packed, params)


def attend(
    scheme: Scheme,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    window: bool = True,
    params: Params | None = None,
    sliding: int | None = None,
    start: Tensor | int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention of the last Q of T tokens: q (B, Hq, Q, D), k and v (B, H, T, D).

    Returns (out float64 (B, Hq, Q, D), lse float64 (B, Hq, Q): the natural logarithm of the sum of exp of the scaled
    scores); zeros and -inf for a query that sees no token.  The Q tokens are one step: with prefill="exact" they are
    seen exactly and the T - Q older ones as the cache held them before the step, with prefill="stored" all tokens as it
    holds them after.  Raises ShapeError.

    scale     factor on q.k, default head_dim ** -0.5
    sliding   a query sees the newest `sliding` tokens up to its own
    start     the first visible token, an integer or int (B,): left padding
    softcap   c: scores become c * tanh(score / c) after scaling
    """
    _pair(k, v)
    tokens, queries = k.shape[2], q.shape[2]
    if queries > tokens:
        fact = f"q: shape {tuple(q.shape)} has {queries} queries for {tokens} tokens"
        raise ShapeError(f"{fact}; the queries belong to the last tokens, give at most {tokens}")
    seen = tokens - (queries if scheme.prefill == "exact" else 0)
    packed = {side: packed_tokens(scheme, side, seen) if window else (0, tokens) for side in ("keys", "values")}
    held_keys = contents(scheme.keys, k, packed["keys"], params, "keys")
    held_values = contents(scheme.side("values"), v, packed["values"], params, "values")
    _grouped(q, k)
    raw = products(scheme, q, held_keys, packed["keys"], params)
    return softmax_rows(q, held_keys, held_values, raw=raw, scale=scale, sliding=sliding, start=start, softcap=softcap)


def softmax_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    raw: Tensor | None = None,
    scale: float | None = None,
    sliding: int | None = None,
    start: Tensor | int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`attend` over keys and values as they are, float64; `raw`: products in place of q.k, (B, Hq, Q, T)."""
    group = _grouped(q, k)
    batch, heads, queries, _ = q.shape
    tokens = k.shape[2]
    factor = q.shape[3] ** -0.5 if scale is None else scale
    if raw is None:
        raw = widened(q, "q") @ k.to(torch.float64).repeat_interleave(group, 1).transpose(2, 3)
    logits = raw * factor
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    position = torch.arange(tokens - queries, tokens)[:, None]
    token = torch.arange(tokens)[None, :]
    visible = token <= position
    if sliding is not None:
        visible = visible & (token > position - sliding)
    visible = visible.expand(batch, heads, queries, tokens)
    if start is not None:
        first = torch.as_tensor(start).to("cpu", torch.int64).expand(batch)
        visible = visible & (token >= first[:, None, None, None])

    values = v.to(torch.float64).repeat_interleave(group, 1)
    out = torch.zeros(batch, heads, queries, v.shape[3], dtype=torch.float64)
    lse = torch.full((batch, heads, queries), -math.inf, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                row = visible[b, h, i]
                if row.any():
                    seen = logits[b, h, i][row]
                    lse[b, h, i] = torch.logsumexp(seen, 0)
                    out[b, h, i] = torch.softmax(seen, 0) @ values[b, h][row]
    return out, lse


def _pair(k: Tensor, v: Tensor) -> None:
    widened(k, "k")
    widened(v, "v")
    if k.shape[:3] != v.shape[:3]:
        right = (*k.shape[:3], v.shape[3])
        raise ShapeError(f"v: shape {tuple(v.shape)}; the right one for keys {tuple(k.shape)} is {right}")


def _grouped(q: Tensor, k: Tensor) -> int:
    """Query heads a kv head, after checking that q fits k."""
    widened(q, "q")
    widened(k, "k")
    (batch, heads, _, width), (b, kv_heads, _, d) = q.shape, k.shape
    if batch != b or width != d or heads % kv_heads:
        right = f"({b}, a multiple of {kv_heads}, queries, {d})"
        raise ShapeError(f"q: shape {tuple(q.shape)}; the right one for keys {tuple(k.shape)} is {right}")
    return heads // kv_heads
