"""What a model's layers are given: the queries of every layer, and the keys and values that its cache would hold; and
how much the model's loss cares for these."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

from kvdsl.fisher import Gradients

from .attention import attention
from .masks import mask
from .plug import implementations, restore

NAME = "kvdsl_observed"
PIECE = 512  # tokens of one text
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


def weighed(model: Any, ids: Tensor) -> list[tuple[Tensor, Tensor, Tensor | None, Gradients]]:
    """The same with the derivatives of the loss by keys and by values, (B, H, T, D) in float32: of the sum over the
    tokens of -log p(next token), by the keys and values as the cache holds them.

    `ids` (1, N) are cut into B texts of equally many tokens, at most PIECE, each read on its own from position 0; up to
    B - 1 tokens at the end are left out.  One text's graph is in memory at a time, without the weights' derivatives.
    """
    count = -(-ids.shape[1] // PIECE)
    size = ids.shape[1] // count
    pieces = [_weighed(model, ids[:, i * size : (i + 1) * size]) for i in range(count)]
    found = []
    for parts in zip(*pieces, strict=True):
        k, v, dk, dv = (torch.cat([part[i] for part in parts]) for i in (0, 1, 3, 4))
        queries = [part[2] for part in parts if part[2] is not None]
        found.append((k, v, torch.cat(queries) if queries else None, (dk, dv)))
    return found


def _weighed(model: Any, ids: Tensor) -> list[tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]]:
    cache: Any = _Leaves()
    with torch.enable_grad(), _frozen(model), _watching(model) as queries:
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits.float(), ids[0, 1:], reduction="sum")
        leaves = [x for pair in cache.leaves for x in pair]
        gradients = torch.autograd.grad(loss, leaves)
    sides = (iter(gradients),) * 2
    return [
        (layer.keys.detach(), layer.values.detach(), queries.get(index), dk.float(), dv.float())
        for index, (layer, (dk, dv)) in enumerate(zip(cache.layers, zip(*sides, strict=True), strict=True))
    ]


class _Leaves(DynamicCache):
    """Adds a zero to what every layer reads, so that the loss can be asked for its derivative by that."""

    def __init__(self) -> None:
        super().__init__()
        self.leaves: list[tuple[Tensor, Tensor]] = []

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """In the order of the layers: each is met once."""
        read = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        assert layer_idx == len(self.leaves)
        self.leaves.append(tuple(torch.zeros_like(x, requires_grad=True) for x in read))  # type: ignore[arg-type]
        return tuple(x + leaf for x, leaf in zip(read, self.leaves[-1], strict=True))


@contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """No derivative by any weight is kept ready."""
    before = {name: x.requires_grad for name, x in model.named_parameters()}
    try:
        model.requires_grad_(False)
        yield
    finally:
        for name, x in model.named_parameters():
            x.requires_grad_(before[name])


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
