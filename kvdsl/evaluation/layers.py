"""Errors of each layer's keys, values, scores and attention, on what a model gives it: arrays for a map of heat.

Each layer is given exact keys, values and queries, so its errors are its own and nothing adds up over layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvdsl.errors import CacheError
from kvdsl.hf import cache as packed_cache
from kvdsl.hf.attention import by_hand
from kvdsl.kernels import Backend, Params
from kvdsl.scheme import Scheme

from .filling import Layer, put

OUTLIER = 3.0
"""An outlier channel of a head has a root mean square of so many times the median of the head's channels."""
Row = dict[str, Any]


def errors(
    scheme: Scheme, model: Any, layers: list[Layer], context: int, params: Params | None, backend: Backend | None
) -> Row:
    """Of every layer, a list over its kv heads; `layers` as kvdsl.hf.observed gives them for all N tokens, of which the
    last N - context ask, seeing each other exactly.  Attention is the plain one, under the layer's sliding window.

    output       |out^ - out| / |out|, over the head's queries
    score        |q.k^ - q.k| / |q.k|, over the context's tokens, in a sliding window those that the first query sees;
                 score_outlier, score_other: with the error of keys in outlier channels alone, and in the others alone
    key, value   |x^ - x| / |x|; key_outlier, key_other: of these channels alone
    outliers     how many channels they are

    Lists of scores, keys and values hold None where a router has dropped tokens: they have no numbers.
    """
    cache = packed_cache(scheme, model, params=params, backend=backend)
    rows = [_of_layer(cache, index, layer, context) for index, layer in enumerate(layers)]
    return {name: [row[name] for row in rows] for name in rows[0]}


def _of_layer(cache: Any, index: int, layer: Layer, context: int) -> Row:
    keys, values, queries = layer
    if queries is None:
        raise ValueError(f"model: layer {index} does not call the attention function, so its queries are not known")
    heads, fresh = keys.shape[1], keys.shape[2] - context
    put(cache, index, keys[:, :, :context], values[:, :, :context], queries[:, :, :context])
    packed, window = cache.layers[index].packed, cache.layers[index].window
    begin = 0 if window is None else max(0, context + 1 - window)  # what the first query sees
    asked = queries[:, :, context:].contiguous()
    found: dict[str, Any] = _of_numbers(packed, keys, values, asked, begin, context)
    out, _ = packed.append_and_attend(asked, keys[:, :, context:], values[:, :, context:])
    exact = by_hand(
        asked, keys, values, _mask(fresh, keys.shape[2], window).to(keys.device), asked.shape[3] ** -0.5, None, None
    )
    error = (out - exact.transpose(1, 2)).double().unflatten(1, (heads, -1))
    return {"output": _ratios(error, exact.transpose(1, 2).double().unflatten(1, (heads, -1))), **found}


def _of_numbers(packed: Any, keys: Tensor, values: Tensor, queries: Tensor, begin: int, context: int) -> Row:
    """Of keys, values and scores of the tokens [begin, context), exact ones among them, as the cache holds them."""
    heads = keys.shape[1]
    k, v = (x[:, :, begin:context].double() for x in (keys, values))
    size = k.square().mean((0, 2)).sqrt()  # (H, D)
    outlier = size > OUTLIER * size.median(1, keepdim=True).values
    counts = outlier.sum(1).tolist()
    names = ("score", "score_outlier", "score_other", "key", "key_outlier", "key_other", "value")
    try:
        dk, dv = (packed.dense(s)[:, :, begin:context].double() - x for s, x in (("keys", k), ("values", v)))
    except CacheError:
        return {**{name: [None] * heads for name in names}, "outliers": counts}
    own = outlier[None, :, None]
    q = queries.double().unflatten(1, (heads, -1)).flatten(2, 3)  # (B, H, group x Q, D)
    scores = q @ k.mT
    parts = {"": dk, "_outlier": dk * own, "_other": dk * ~own}
    return {
        **{f"score{name}": _ratios(q @ part.mT, scores) for name, part in parts.items()},
        "key": _ratios(dk, k),
        "key_outlier": _ratios(dk * own, k * own),
        "key_other": _ratios(dk * ~own, k * ~own),
        "value": _ratios(dv, v),
        "outliers": counts,
    }


def _ratios(error: Tensor, of: Tensor) -> list[float]:
    """|error| / |of| of every kv head, (B, H, ...); 0 where there is nothing."""
    sizes = zip(error.transpose(0, 1).flatten(1).norm(dim=1), of.transpose(0, 1).flatten(1).norm(dim=1), strict=True)
    return [float(f"{(a / b).item() if b else 0.0:.6g}") for a, b in sizes]


def _mask(queries: int, tokens: int, window: int | None) -> Tensor:
    """True where a query sees a token, (1, 1, Q, T): the last queries are the newest tokens."""
    position, token = torch.arange(tokens - queries, tokens)[:, None], torch.arange(tokens)[None]
    seen = token <= position
    return (seen if window is None else seen & (token > position - window))[None, None]
