"""A cache that grows: the model of what a real one must show after every operation."""

from __future__ import annotations

import torch
from torch import Tensor

from kvdsl.errors import ShapeError
from kvdsl.scheme import Scheme

from .attention import softmax_rows
from .quantize import Params, widened
from .queries import products
from .timeline import contents, packed_tokens


class Stream:
    """A cache over time: it keeps everything that was appended and tells from the definitions what a cache holds."""

    def __init__(self, scheme: Scheme, *, params: Params | None = None) -> None:
        self.scheme = scheme
        self.params = params
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.fresh = 0

    @property
    def tokens(self) -> int:
        """Tokens appended so far."""
        return 0 if self.keys is None else self.keys.shape[2]

    def append(self, k: Tensor, v: Tensor) -> None:
        """One step's new tokens, (B, H, m, D) each.  Raises ShapeError if they do not continue what is there."""
        for name, new, old in (("keys", k, self.keys), ("values", v, self.values)):
            widened(new, name)
            right = (*k.shape[:3], new.shape[3]) if old is None else (*old.shape[:2], k.shape[2], old.shape[3])
            if tuple(new.shape) != right:
                raise ShapeError(f"{name}: shape {tuple(new.shape)}; the right one is {right}")
        self.keys = k if self.keys is None else torch.cat([self.keys, k], 2)
        self.values = v if self.values is None else torch.cat([self.values, v], 2)
        self.fresh = k.shape[2]

    def select(self, sequences: Tensor) -> None:
        """Keep the sequences of these indices, in this order (repeats allowed)."""
        assert self.keys is not None and self.values is not None
        self.keys, self.values = self.keys[sequences], self.values[sequences]

    def packed(self, side: str) -> tuple[int, int]:
        """(first, end) of the packed tokens once the last append was flushed."""
        return packed_tokens(self.scheme, side, self.tokens)

    def rows(self, side: str) -> Tensor:
        """What the cache holds of a side: float64 (B, H, tokens, D), packed tokens decoded, the rest exact."""
        x = self.keys if side == "keys" else self.values
        assert x is not None
        store = self.scheme.side("keys" if side == "keys" else "values")
        return contents(store, x, self.packed(side), self.params, side)

    def attend(
        self,
        q: Tensor,
        *,
        scale: float | None = None,
        sliding: int | None = None,
        start: Tensor | int | None = None,
        softcap: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attention of the newest Q tokens' queries (B, Hq, Q, D), as `kvdsl.reference.attend`.

        With prefill="exact" the tokens of the last append are seen exactly and older ones as they were before it.
        """
        assert self.keys is not None and self.values is not None
        seen = self.tokens - (self.fresh if self.scheme.prefill == "exact" else 0)
        held = []
        for side, x in (("keys", self.keys), ("values", self.values)):
            store = self.scheme.side("keys" if side == "keys" else "values")
            held.append(contents(store, x, packed_tokens(self.scheme, side, seen), self.params, side))
        raw = products(self.scheme, q, held[0], packed_tokens(self.scheme, "keys", seen), self.params)
        return softmax_rows(q, *held, raw=raw, scale=scale, sliding=sliding, start=start, softcap=softcap)


def stream(scheme: Scheme, k: Tensor, v: Tensor, *, params: Params | None = None) -> Stream:
    """A `Stream` whose first append was `k` and `v`, (B, H, m, D) each."""
    cache = Stream(scheme, params=params)
    cache.append(k, v)
    return cache
