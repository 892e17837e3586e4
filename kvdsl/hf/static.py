"""Decoding in place under transformers: layers of which `generate()` compiles a step, and a CUDA graph holds it.

A prompt is appended as ever.  Behind it every layer's StaticCache takes over: a step's tokens then go through one
opaque operation, `kvdsl::step`, whose layer it finds by number.  What the layer holds is no tensor of the traced graph:
its addresses never change, and nothing but that operation touches it.
"""

from __future__ import annotations

import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from kvdsl.errors import CacheError
from kvdsl.static_cache import StaticCache

from .layer import PackedLayer, Step

LAYERS: WeakValueDictionary[int, StaticLayer] = WeakValueDictionary()
NUMBERS = itertools.count()


class Awaited:
    """The layer whose fresh keys and values the next attention call is given, where they are plain tensors."""

    layer: StaticLayer | None = None


AWAITED = Awaited()


class StaticLayer(PackedLayer):  # type: ignore[no-untyped-call]
    """A packed layer of `capacity` tokens a sequence that decodes in place once it holds a prompt.

    `before` are the model's layers so far: they move the counts on for those behind them.
    """

    is_compileable = True

    def __init__(self, *args: Any, capacity: int, before: list[StaticLayer], **kwargs: Any) -> None:
        super().__init__(*args, capacity=capacity, **kwargs)
        self.capacity: int
        self.number = next(NUMBERS)
        LAYERS[self.number] = self
        self.static: StaticCache | None = None
        self.begun = False
        self.there = torch.zeros((), dtype=torch.int64)
        self._before = before

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take keys and values (B, H, m, D): a token in place, or a prompt as ever."""
        if self.begun and key_states.shape[2] == 1:
            self.there.add_(1)
            AWAITED.layer = self
            return key_states, value_states
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return keys, values

    def attended(
        self, query: Tensor, keys: Tensor, values: Tensor, scaling: float, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        """A step of one token: (out like query, lse (B, Hq, 1) float32)."""
        out, lse = torch.ops.kvdsl.step(query, keys, values, self.number, scaling, softcap)
        return out, lse

    def get_seq_length(self) -> Any:
        """Tokens seen, padding included; on the device while steps go in place."""
        return self.there if self.begun else super().get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As of the library's static layers."""
        return (self.capacity, 0) if self.begun else super().get_mask_sizes(query_length)

    def get_max_length(self) -> int:
        """Tokens that there is room for."""
        return self.capacity

    def append(self, step: Step, counts: Any, q_heads: int | None, softcap: bool) -> Any:
        """Store a prompt's tokens; steps go in place from then on."""
        if self.packed is not None and self.packed.batch != step.keys.shape[0]:
            if any(self.packed.lengths):
                raise CacheError(f"cache: {step.keys.shape[0]} sequences, it holds {self.packed.batch}; reset() it")
            self.packed = self.static = None
        state = super().append(step, counts, q_heads, softcap)
        self._begin()
        return state

    def _begin(self) -> None:
        assert self.packed is not None
        if self.static is None:
            shared = [layer.static.counts for layer in self._before if layer.static is not None and self._alike(layer)]
            self.static = StaticCache(self.packed, self.capacity, *shared[:1])
            if self.there.device != self.packed.device:
                self.there = self.there.to(self.packed.device)
            torch._dynamo.mark_static_address(self.there)
        self.static.begin()
        self.there.fill_(self.seen)
        self.begun = True

    def _alike(self, other: StaticLayer) -> bool:
        """Whether tokens are packed when those of another layer are."""
        mine, theirs = (layer.packed.mark().policy.windows for layer in (self, other))
        return bool(mine == theirs)

    def settle(self) -> None:
        """Tell the packed cache what came in place: the device is waited for."""
        super().settle()
        if self.begun and self.static is not None:
            self._end()
            self.static.settle()

    def _end(self) -> None:
        """No more steps in place: how many there were is asked of the device."""
        self.begun = False
        before, self.seen = self.seen, int(self.there)
        self.calls["packed_calls"] += self.seen - before

    def reset(self) -> None:
        """Forget the tokens, not where they were: a compiled step is good for the next prompt."""
        packed = self.packed
        if self.begun:
            self._end()
        super().reset()
        if packed is not None:
            packed.reset()
            self.packed = packed


@torch.library.custom_op("kvdsl::step", mutates_args=())
def step(
    query: Tensor, keys: Tensor, values: Tensor, layer: int, scaling: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Append one token to a layer and attend; the layer's own memory is none of the operation's arguments."""
    static = LAYERS[layer].static
    assert static is not None
    return static.step(query.contiguous(), keys, values, scaling=scaling, softcap=softcap)


@step.register_fake
def _(
    query: Tensor, keys: Tensor, values: Tensor, layer: int, scaling: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query, memory_format=torch.contiguous_format), query.new_empty(
        query.shape[:3], dtype=torch.float32
    )
