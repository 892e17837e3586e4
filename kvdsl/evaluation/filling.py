"""A prompt run once in full precision, and put into any packed cache as a real prompt would be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kvdsl.generation import continued, full_cache
from kvdsl.hf import cache as packed_cache
from kvdsl.hf import latent, observed
from kvdsl.hf.handle import step_of
from kvdsl.hf.layer import PackedCache
from kvdsl.hf.plug import implementations, restore
from kvdsl.kernels import Backend, Params
from kvdsl.params import of_all_layers
from kvdsl.scheme import Scheme

from .units import Unit

Layer = tuple[Tensor, Tensor, Tensor | None]


@contextmanager
def unchanged(model: Any) -> Iterator[None]:
    """The model's attention is as before afterwards, and so are modules that cache latents."""
    before = implementations(model)
    try:
        yield
    finally:
        latent.restore(model)
        restore(before)


@dataclass(frozen=True)
class Prompt:
    """The first `context` tokens of a unit: `layers` is what each layer of the model is given of them."""

    model: Any
    unit: Unit
    layers: list[Layer]

    @classmethod
    def of(cls, model: Any, unit: Unit) -> Prompt:
        """Run the prompt."""
        ids = unit.ids[None, : unit.context].to(model.device)
        return cls(model, unit, observed(model, ids))

    @property
    def ids(self) -> Tensor:
        """All tokens of the unit, on the model's device."""
        return self.unit.ids.to(self.model.device)

    def in_full(self) -> Any:
        """The library's own cache, the prompt in it."""
        cache = full_cache(self.model)
        for index, (keys, values, _) in enumerate(self.layers):
            cache.update(keys, values, index)
        return cache

    @cached_property
    def expected(self) -> Tensor:
        """Log-probabilities in full precision, float64, of what follows the prompt; see kvdsl.generation.continued."""
        return continued(self.model, self.ids, self.in_full(), context=self.unit.context, chunk=self.unit.chunk)

    @cached_property
    def weights(self) -> Tensor:
        """The probabilities that these are the logarithms of."""
        return self.expected.exp()

    def packed(self, scheme: Scheme, params: Params | None, backend: Backend | None) -> PackedCache:
        """A packed cache with the prompt in it.

        Where a prompt's own attention is exact, a packed cache is given the same keys and values as any other, so they
        are put in as they were observed, and a router asks the queries that were: what is packed is what a real prompt
        packs, to the bit.  Where attention already reads what is stored (prefill="stored"), or a router would be told
        of another attention than the model's, the prompt is run through the cache.  The model's attention is set.
        """
        cache = packed_cache(scheme, self.model, params=params, backend=backend)
        if not self._alike(scheme):
            ids = self.ids[None, : self.unit.context]
            with torch.no_grad():
                self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            return cache
        for index, (keys, values, queries) in enumerate(self.layers):
            put(cache, index, keys, values, queries)
        return cache

    def _alike(self, scheme: Scheme) -> bool:
        """Whether the layers' tokens say all that a cache of this scheme takes from a prompt."""
        schemes = of_all_layers(scheme)
        if any(one.prefill != "exact" for one in schemes):
            return False
        routed = any(one.routed or one.heads for one in schemes)
        return not routed or usual_attention(self.model) and all(queries is not None for *_, queries in self.layers)


def put(cache: PackedCache, index: int, keys: Tensor, values: Tensor, queries: Tensor | None) -> None:
    """Tokens (1, H, T, D) into one layer, as its first; routed by their queries (1, Hq, T, D)."""
    step = step_of(*cache.layers[index].update(keys, values))
    assert step is not None
    step.append(None, None, None if queries is None else queries.shape[1])
    if queries is not None:
        step.routed(queries, queries.shape[3] ** -0.5)


def usual_attention(model: Any) -> bool:
    """Whether all layers attend to all tokens before, scores over the square root of head_dim, without a cap."""
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "attn_logit_softcapping", None) is not None or any(
        getattr(layer, "is_sliding", False) for layer in full_cache(model).layers
    ):
        return False
    for module in model.modules():
        scaling, width = getattr(module, "scaling", None), getattr(module, "head_dim", None)
        if isinstance(scaling, float) and isinstance(width, int) and abs(scaling * width**0.5 - 1) > 1e-6:
            return False
    return True
