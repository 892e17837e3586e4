"""What a model's layers are given: the queries of every layer, and the keys and values that its cache would hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

from .attention import attention
from .masks import mask
from .plug import implementations, restore

NAME = "kvdsl_observed"
_SEEN: ContextVar[dict[int, Tensor] | None] = ContextVar("_SEEN", default=None)


def observed(model: Any, ids: Tensor) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """(keys, values, queries) of every layer over the tokens `ids` (1, T): (1, H, T, D), keys after rotation.

    Queries (1, Hq, T, D) as the attention function gets them; None for a layer that does not call it.  The model is as
    before afterwards.
    """
    cache: Any = DynamicCache()
    with torch.no_grad(), _watching(model) as queries:
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return [(layer.keys, layer.values, queries.get(index)) for index, layer in enumerate(cache.layers)]


@contextmanager
def _watching(model: Any) -> Iterator[dict[int, Tensor]]:
    before, seen = implementations(model), dict[int, Tensor]()
    token = _SEEN.set(seen)
    try:
        model.set_attn_implementation(NAME)
        yield seen
    finally:
        _SEEN.reset(token)
        restore(before)


def _attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The usual attention, its queries noted."""
    seen, index = _SEEN.get(), getattr(module, "layer_idx", None)
    if seen is not None and index is not None:
        seen[index] = query.detach()
    return attention(module, query, key, value, *args, **kwargs)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, mask)
