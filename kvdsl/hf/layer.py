"""The layer protocol of transformers' caches over QuantizedCache: one layer object for each layer of a model."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from kvdsl.codegen import build, build_tiers
from kvdsl.errors import CacheError, ShapeError
from kvdsl.inputs import DTYPES
from kvdsl.interpreting import interpreted
from kvdsl.kernels import Backend, Params
from kvdsl.making import AnyCache, made
from kvdsl.scheme import Scheme
from kvdsl.shape import InputFormat, Shape

from .handle import Handle, Which

FORMATS: dict[torch.dtype, InputFormat] = {dtype: name for name, dtype in DTYPES.items()}  # type: ignore[misc]
DRAFT = 64
"""Tokens that stay croppable without loss while the past is recorded; a longer draft raises it."""


class Step:
    """The keys and values (B, H, m, D) of one forward in one layer: appended by whoever reads them first.

    `visible` tokens is what the library expects to see of the layer, fresh ones included.  Appending waits for the
    attention, because only its mask says which of the tokens are padding.
    """

    def __init__(self, layer: PackedLayer, keys: Tensor, values: Tensor, visible: int) -> None:
        self.layer, self.keys, self.values, self.visible = layer, keys, values, visible
        self.state: Any = None
        self.began_empty = not layer.seen
        self._numbers: dict[Which, Tensor] = {}
        self.waits = layer.scheme.routed or bool(layer.scheme.heads)

    def append(
        self,
        counts: Sequence[int] | None,
        order: Tensor | None = None,
        q_heads: int | None = None,
        *,
        softcap: bool = False,
    ) -> None:
        """Store the tokens (the last counts_b of sequence b, after the permutation `order`) unless that is done."""
        if self.state is None:
            if order is not None:
                self.keys, self.values = permuted(self.keys, order), permuted(self.values, order)
                self.layer.has_gaps = True
            self.state = self.layer.append(self, counts, q_heads, softcap)

    def routed(
        self, query: Tensor | None = None, scaling: float = 1.0, softcap: float | None = None,
        lse: Tensor | None = None, window: int | None = None,
    ) -> None:  # fmt: skip
        """Behind the step's attention by its queries (B, Hq, Q, D), in a sliding window: send to tiers what is due;
        none where it is done, or where other code has computed the attention, whose queries are not known."""
        packed = self.layer.packed
        if self.waits and packed is not None and self.state is not None:
            self.waits = False
            self.layer._last = None
            state = self.state if query is None else packed.tuned(self.state, scaling, softcap, window)
            packed.route(query, state, lse)

    def numbers(self) -> dict[Which, Tensor]:
        """Keys and values (B, H, visible, D) as this step sees them, decoded; the tokens are appended.

        Raises CacheError where padding inside the sequence was left out, since the places are no longer the library's.
        """
        if not self._numbers:
            sides: tuple[Which, Which] = ("keys", "values")
            fresh = {"keys": self.keys, "values": self.values}
            exact = self.layer.scheme.prefill == "exact" and self.state is None
            old = {side: self.layer.dense(side) for side in sides} if exact else {}
            self.append(None)
            for side in sides:
                tokens = torch.cat([old[side], fresh[side]], 2) if exact else self.layer.dense(side)
                self._numbers[side] = _right_aligned(tokens, self.visible)
        return self._numbers

    def touched(self, which: Which) -> Tensor:
        """The numbers, for code that does not know handles: counted, and warned about the first time."""
        self.layer.fell_back(
            "code other than kvdsl's attention computes with the cache, so it is decoded at every step; "
            'model.set_attn_implementation("kvdsl") reads the packed bytes instead'
        )
        return self.numbers()[which]


def permuted(x: Tensor, order: Tensor) -> Tensor:
    """x (B, H, T, D) with token order[b, t] at place t."""
    return x.gather(2, order[:, None, :, None].expand_as(x))


def _right_aligned(x: Tensor, tokens: int) -> Tensor:
    short = tokens - x.shape[2]
    return torch.nn.functional.pad(x, (0, 0, short, 0)) if short > 0 else x[:, :, x.shape[2] - tokens :]


class PackedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer: scheme and window are known, batch, heads and dtype come with the first tokens.

    `seen` counts tokens as the library does, padding included; the QuantizedCache holds those that are no padding.
    """

    is_compileable = False
    is_croppable = True
    supports_early_init = False
    begun = False
    """Whether tokens go in place, see static.py."""

    def __init__(
        self,
        scheme: Scheme,
        *,
        window: int | None = None,
        params: Params | None = None,
        backend: Backend | None = None,
        heads: int | None = None,
        kv_heads: int | None = None,
        softcap: bool = False,
        capacity: int | None = None,
        batch_invariant: bool = False,
        calls: Counter[str] | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.scheme, self.window, self.params, self.backend = scheme, window, params, backend
        self.heads, self.kv_heads, self.softcap, self.capacity = heads, kv_heads, softcap, capacity
        self.batch_invariant = batch_invariant
        self.calls: Counter[str] = Counter() if calls is None else calls
        self.is_sliding = window is not None
        self.record_past = False
        self.seen = 0
        self.has_gaps = False
        self.packed: Any = None  # of a kind that its scheme asks for, see making.py
        self._draft = 0
        self._step: Step | None = None
        self._last: Step | None = None  # the newest that was appended, as long as its tokens wait for a router

    # -- what the library calls in a forward ---------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note dtype and device; the packed cache itself is made with the first tokens."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = self.values = torch.empty(0, dtype=self.dtype, device=self.device)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take keys and values (B, H, m, D), or latents and keys with rotary positions of models that cache these, and
        return handles on all that the step sees."""
        self.settle()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.scheme.shared:  # the library's own pair is a latent and a key with rotary positions
            key_states, value_states = torch.cat((key_states, value_states), -1), key_states
        visible, _ = self.get_mask_sizes(key_states.shape[2])
        step = Step(self, key_states, value_states, visible)
        self._step = step
        return Handle(step, "keys"), Handle(step, "values")

    def get_seq_length(self) -> int:
        """Tokens seen, padding included."""
        self.settle()
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(tokens the next step of `query_length` tokens sees, position of the first of them)."""
        self.settle()
        old = self.seen if self.window is None else min(self.seen, self.window - 1)
        return old + query_length, self.seen - old

    def get_max_length(self) -> int:
        """-1: no limit; a sliding layer says its window."""
        return -1 if self.window is None else self.window

    # -- the tokens ----------------------------------------------------------------------------------------------------

    def append(self, step: Step, counts: Sequence[int] | None, q_heads: int | None, softcap: bool) -> Any:
        """Store a step's tokens; returns what its attention reads."""
        if self._step is step:
            self._step = None
            self._last = step if step.waits else None
        fresh = step.keys.shape[2]
        if self.packed is None:
            self.packed = self._made(step, q_heads, softcap or self.softcap)
            self._draft = 0
        if self.record_past and self._draft < max(DRAFT, fresh if self.seen else 0):
            self._draft = max(DRAFT, 2 * fresh if self.seen else 0)
            self.packed.record(self._draft)
        state = self.packed.append(step.keys, step.values, counts=counts)
        if counts is not None:
            lengths = self.packed.lengths
            self.has_gaps |= any(c < fresh and length > c for c, length in zip(counts, lengths, strict=True))
        self.seen += fresh
        return state

    def _made(self, step: Step, q_heads: int | None, softcap: bool) -> AnyCache:
        keys, values = step.keys, step.values
        if keys.shape[3] != values.shape[3] and not self.scheme.shared:
            raise ShapeError(
                f"values: head_dim {values.shape[3]} beside keys of {keys.shape[3]}; a cache needs them equal"
            )
        if keys.dtype not in FORMATS:
            raise ShapeError(f"keys: {keys.dtype} is none of float16, bfloat16, float32; load the model in one of them")
        if self.kv_heads not in (None, keys.shape[1]):
            raise ShapeError(f"keys: {keys.shape[1]} heads, and by the model's tp_plan a rank has {self.kv_heads}")
        heads = q_heads or self.heads
        if heads is None or heads % keys.shape[1]:
            heads = keys.shape[1]
        shape = Shape(keys.shape[3], keys.shape[1], heads, FORMATS[keys.dtype], softcap)
        backend = self.backend
        if backend is None and keys.device.type == "cpu" and not interpreted():
            backend = "torch"
        options: dict[str, Any] = {} if self.capacity is None else {"capacity": self.capacity}
        return made(
            self.scheme, shape, keys.shape[0], build, build_tiers, backend=backend, device=keys.device,
            params=self.params, window=self.window, batch_invariant=self.batch_invariant, **options,
        )  # fmt: skip

    def settle(self) -> None:
        """Append the tokens of a step that no attention has read, and send on those of one that it has."""
        if self._step is not None:
            self._step.append(None)
        if self._last is not None:
            last, self._last = self._last, None
            last.routed()

    def dense(self, side: Which) -> Tensor:
        """All tokens of a side, decoded, (B, H, longest, D), right aligned; before the first token of no length."""
        if self.has_gaps:
            raise CacheError(
                "cache: padding after the first token was left out, so the tokens no longer stand where a full mask or "
                "another attention has them; keep to causal masks and kvdsl's attention, or pad on the left"
            )
        if self.packed is None:
            assert self._step is not None
            like = self._step.keys if side == "keys" else self._step.values
            return like[:, :, :0]
        return self.packed.dense(side)

    def fell_back(self, why: str) -> None:
        """Count a read of decoded numbers, and warn about the first of the whole cache."""
        self.calls["fallbacks"] += 1
        if self.calls["fallbacks"] == 1:
            warnings.warn(f"kvdsl: {why}", stacklevel=3)

    # -- what decoding strategies call ---------------------------------------------------------------------------------

    def activate_past_recording(self) -> None:
        """From now on the newest tokens can be cropped without loss, also in a sliding window."""
        self.settle()
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest -tokens_to_remove (<= 0) tokens.  CacheError where a sliding window has let go of them."""
        self.settle()
        if tokens_to_remove > 0:
            raise ValueError(f"crop: {tokens_to_remove} is positive; give minus the number of tokens to remove")
        drop = min(-tokens_to_remove, self.seen)
        if not drop or self.packed is None:
            return
        self.packed.crop([max(0, length - drop) for length in self.packed.lengths])
        self.seen -= drop

    def reorder_cache(self, beam_idx: Tensor | Sequence[int]) -> None:
        """Sequence i becomes what sequence beam_idx_i was."""
        self.settle()
        if self.packed is not None:
            self.packed.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence `repeats` times, the copies beside each other."""
        self.settle()
        if self.packed is not None:
            self.packed.repeat(repeats)

    def batch_select_indices(self, indices: Tensor | Sequence[int]) -> None:
        """Keep the sequences of these indices."""
        self.settle()
        if self.packed is not None:
            if isinstance(indices, Tensor) and indices.dtype == torch.bool:
                indices = indices.nonzero().flatten()
            self.packed.select(indices)

    def reset(self) -> None:
        """Forget everything; the next tokens may have another batch size."""
        self._step = self._last = self.packed = None
        self.seen, self.has_gaps, self.is_initialized = 0, False, False
        self.keys = self.values = None

    def offload(self) -> None:
        """Nothing: pages stay on their device."""

    def prefetch(self) -> None:
        """Nothing: pages stay on their device."""

    def __getstate__(self) -> dict[str, Any]:
        self.settle()
        return self.__dict__.copy()

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        self.settle()
        return self.packed.nbytes if self.packed is not None else 0

    def stats(self) -> dict[str, float]:
        """QuantizedCache.stats of the layer; empty before the first token."""
        self.settle()
        return self.packed.stats() if self.packed is not None else {}


class PackedCache(Cache):
    """A transformers cache of packed layers, to be passed as `past_key_values`.  Made by `kvdsl.cache`."""

    def __init__(self, layers: list[Any], scheme: Scheme, calls: Counter[str]) -> None:
        super().__init__(layers=layers)
        self.layers: list[Any]
        self.scheme, self.calls = scheme, calls
        self._dense_before = dense_calls()

    @property
    def packed_layers(self) -> list[PackedLayer]:
        """The layers that hold keys and values in this scheme."""
        return [layer for layer in self.layers if isinstance(layer, PackedLayer)]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See PackedLayer.update.  CacheError when a forward failed halfway, so that layers hold different tokens."""
        mine = self.packed_layers
        if self.layers[layer_idx] is mine[0] and not any(layer.begun for layer in mine):
            lengths = {layer.get_seq_length() for layer in mine}
            if len(lengths) > 1:
                raise CacheError(
                    f"cache: layers hold {min(lengths)} to {max(lengths)} tokens, a forward failed halfway; reset() it"
                )
        keys, values = self.layers[layer_idx].update(key_states, value_states, *args, **kwargs)
        return keys, values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder all layers; the device is waited for once."""
        index = beam_idx.tolist()
        for layer in self.layers:
            layer.reorder_cache(index if isinstance(layer, PackedLayer) else beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences of these indices in all layers; the device is waited for once."""
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        index = indices.tolist()
        for layer in self.layers:
            layer.batch_select_indices(index if isinstance(layer, PackedLayer) else indices)

    @property
    def nbytes(self) -> int:
        """Bytes held by all layers: codes, metadata, exact tokens, tables."""
        return sum(layer.nbytes for layer in self.packed_layers)

    def stats(self) -> dict[str, Any]:
        """What is held, and how it was read.

        bytes, tokens (of all sequences), bits (bytes for each number of keys and values seen, everything included);
        packed_calls: attention that read packed bytes; fresh_calls: first prompts attended from the fresh tensors;
        dense_calls: attention without a packed cache, anywhere, since this one was made; fallbacks: handles decoded for
        other code or other masks; requantized_tokens: quantized a second time after a crop; layers: the same by layer.
        """
        layers = [
            {"layer": i, **layer.stats()} for i, layer in enumerate(self.layers) if isinstance(layer, PackedLayer)
        ]
        filled = [layer for layer in layers if len(layer) > 1]
        numbers = sum(8 * layer["bytes"] / layer["bits"] for layer in filled if layer["bits"])
        return {
            "bytes": self.nbytes,
            "tokens": max((layer["tokens"] for layer in filled), default=0),
            "bits": 8 * self.nbytes / numbers if numbers else 0.0,
            "packed_calls": self.calls["packed_calls"],
            "fresh_calls": self.calls["fresh_calls"],
            "dense_calls": dense_calls() - self._dense_before,
            "fallbacks": self.calls["fallbacks"],
            "requantized_tokens": sum(layer["requantized_tokens"] for layer in filled),
            "layers": layers,
        }


def dense_calls() -> int:
    """Attention calls of this process that were given plain tensors."""
    from .attention import DENSE

    return DENSE["calls"]
