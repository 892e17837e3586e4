"""What a scheme costs a model on a text: how far the next-token distributions read through its cache are off."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .generation import continued, full_cache, predictions
from .kernels import Backend
from .scheme import Scheme
from .search_layers import Observed

CHUNK = 64  # tokens that see each other exactly; no more than most windows keep exact


class Divergence:
    """The mean of KL(full || packed) a token, in nats, teacher-forced through the real packed cache.

    The first `context` tokens of `ids` (N,) are put into a cache; the others follow in chunks, each predicting its
    successor, and read them quantized.  Where a prompt is attended exactly, what the cache is given of it is the same
    for all schemes: `layers`, as kvdsl.hf.observed has it over these tokens, and the prompt is run only once.
    """

    def __init__(
        self,
        model: Any,
        ids: Tensor,
        layers: Sequence[Observed],
        *,
        context: int,
        backend: Backend | None = None,
    ) -> None:
        self.model, self.ids, self.layers, self.context, self.backend = model, ids, layers, context, backend
        self.full = predictions(model, ids, full_cache(model), context=context, chunk=CHUNK)
        self.entropy = self.full.exp()

    def __call__(self, scheme: Scheme) -> float:
        """Infinite where a distribution is no number.  The model is as before afterwards."""
        from .hf import cache as packed_cache

        before = self.model.config._attn_implementation
        try:
            cache = packed_cache(scheme, self.model, backend=self.backend)
            if scheme.prefill == "exact":
                for index, (keys, values, _) in enumerate(self.layers):
                    cache.update(keys[:, :, : self.context], values[:, :, : self.context], index)
                    cache.layers[index].settle()
                found = continued(self.model, self.ids, cache, context=self.context, chunk=CHUNK)
            else:
                found = predictions(self.model, self.ids, cache, context=self.context, chunk=CHUNK)
        finally:
            self.model.set_attn_implementation(before)
        loss = ((self.full - found) * self.entropy).sum(1).mean().item()
        return loss if math.isfinite(loss) else math.inf
