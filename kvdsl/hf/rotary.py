"""Rotary frequencies of a model's layers: its own tables, tried on the keys that the layers make.

One token is run alone at a few positions.  It sees itself only, so all that a layer computes is the same at every
position but for the rotation of its key: k_p = R_p k_0.  Which of the model's tables explains a layer's keys, and which
channels make a pair, needs no knowledge of its family; a layer that does not rotate has frequencies of 0.

A factor on cosines and sines (yarn's `attention_scaling`) needs no care: the key that a layer gives has it, and so has
what is coded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from kvdsl.errors import ShapeError
from kvdsl.kernels import Params
from kvdsl.params import ROPE, rope_of
from kvdsl.rope import turned
from kvdsl.scheme import Scheme

PLACES = (0, 1, 7, 1000)  # positions tried, as far as a model is made for them
ROUNDING = {torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""Largest |R_p^-1 k_p - k_0| / |k_0| of keys that differ by rounding alone.  Wrong pairs and tables are off by about 1.
"""
CHANGING = ("dynamic", "longrope")
ELSE = "or use a scheme without PreRope()"


def completed(scheme: Scheme, model: Any, params: Params | None) -> dict[str, Tensor]:
    """`params` with `layers.<i>.keys.transform[0]`, the frequencies (R/2,), of layers with PreRope.

    Frequencies among `params` are checked: ShapeError where they are not the layer's.  Where there are none, ValueError
    for a model whose rotation PreRope does not describe, or whose frequencies change with the length.
    """
    given = dict(params or {})
    if all(rope_of(own) is None for own in (scheme, *(inner for _, inner in scheme.layers))):
        return given
    config = model.config.get_text_config(decoder=True)
    count = len(DynamicCache(config=config).layers) or config.num_hidden_layers
    ropes = {i: rope for i in range(count) if (rope := rope_of(scheme.for_layer(i, count))) is not None}
    probe = Probe.of(model)
    for index, rope in ropes.items():
        if index in probe.keys:  # layers of other kinds have no keys
            name = f"layers.{index}.{ROPE}"
            taken = given.get(name, given.get(ROPE))
            given[name] = probe.found(index, rope.interleaved) if taken is None else taken
            probe.check(index, rope.interleaved, given[name])
    return given


@dataclass(frozen=True)
class Table:
    """Frequencies (R/2,) float32 that a module of the model holds, and the kind of RoPE it says they are."""

    numbers: Tensor
    kind: str

    @property
    def changes(self) -> bool:
        """Whether they depend on the length of a sequence."""
        return any(kind in self.kind for kind in CHANGING)


@dataclass(frozen=True)
class Probe:
    """A model's tables, and by layer the keys (1, H, P, D) of one token at `places` (P,), the first of which is 0."""

    tables: tuple[Table, ...]
    keys: dict[int, Tensor]
    places: Tensor
    media: bool
    """Whether images and video have positions of their own."""

    @classmethod
    def of(cls, model: Any) -> Probe:
        """Run the token.  ValueError for a model that does not run on token ids and positions."""
        config = model.config.get_text_config(decoder=True)
        longest = getattr(config, "max_position_embeddings", None) or PLACES[-1] + 1
        places = torch.tensor(sorted({min(place, longest - 1) for place in PLACES}))
        token = torch.full((len(places), 1), config.vocab_size // 2, device=model.device)
        cache: Any = DynamicCache(config=config)
        try:
            with torch.no_grad():
                at = places[:, None].to(model.device)
                model(input_ids=token, position_ids=at, past_key_values=cache, use_cache=True)
        except Exception as error:
            raise ValueError(
                f"model: for PreRope one token is run at a few positions, and this {type(model).__name__} cannot be "
                f"run so ({type(error).__name__}: {error}); use a scheme without PreRope()"
            ) from error
        held = ((i, getattr(layer, "keys", None)) for i, layer in enumerate(cache.layers))
        keys = {i: x.transpose(0, 2) for i, x in held if isinstance(x, Tensor) and x.numel()}
        media = "mrope_section" in str(getattr(config, "rope_parameters", None))
        return cls(tuple(_tables(model)), keys, places, media)

    def error(self, index: int, frequencies: Tensor, interleaved: bool) -> float:
        """The largest |R_p^-1 k_p - k_0| / |k_0| over the positions."""
        still = turned(self.keys[index], frequencies, self.places, interleaved, back=True)
        first = still[:, :, :1]
        return float((still - first).square().sum((0, 1, 3)).max().sqrt() / first.norm().clamp(min=1e-30))

    def explaining(self, index: int, interleaved: bool) -> Table | None:
        """The table that explains a layer's keys best; None where none does."""
        keys = self.keys[index]
        half = keys.shape[3] // 2
        tables = (Table(torch.zeros(half), "none"), *(t for t in self.tables if len(t.numbers) <= half))
        errors = [self.error(index, table.numbers, interleaved) for table in tables]
        return tables[errors.index(min(errors))] if min(errors) <= ROUNDING[keys.dtype] else None

    def found(self, index: int, interleaved: bool) -> Tensor:
        """The layer's frequencies by the model; ValueError where there are none that stay."""
        table, place, mend = self.explaining(index, interleaved), f"model: layer {index}", f"give params[{ROPE!r}]"
        if table is None:
            if self.explaining(index, not interleaved) is not None:
                pairs = "channels half of the rotated ones apart" if interleaved else "neighbouring channels"
                raise ValueError(f"{place}: RoPE pairs {pairs}; use PreRope(interleaved={not interleaved})")
            fact = f"none of the model's {len(self.tables)} tables of frequencies explains how its keys are rotated"
            raise ValueError(f"{place}: {fact}; {mend} if you know its frequencies, {ELSE}")
        if table.changes:
            raise ValueError(
                f"{place}: rope_parameters['rope_type'] is {table.kind!r}, whose frequencies change with the length of "
                f"a sequence, and stored keys cannot follow; {mend}, inv_freq at your lengths, {ELSE}"
            )
        if self.media:
            raise ValueError(
                f"{place}: rope_parameters has 'mrope_section', so positions of images and video are no count of "
                f"tokens; {mend}, inv_freq, where all input is text, {ELSE}"
            )
        return table.numbers

    def check(self, index: int, interleaved: bool, given: object) -> None:
        """ShapeError for frequencies that are not the layer's; their shape is for kvdsl.params to refuse."""
        keys = self.keys[index]
        if not isinstance(given, Tensor) or given.dim() != 1 or not 1 <= len(given) <= keys.shape[3] // 2:
            return
        name, numbers = f"params['layers.{index}.{ROPE}']", given.detach().to("cpu", torch.float32)
        table = self.explaining(index, interleaved)
        if table is not None and not table.changes:
            same = len(numbers) == len(table.numbers) and torch.allclose(numbers, table.numbers, rtol=1e-5, atol=0)
        else:
            same = self.error(index, numbers, interleaved) <= ROUNDING[keys.dtype]
        if not same:
            fact = "the layer's keys are rotated by other frequencies"
            raise ShapeError(f"{name}: {fact}; leave it out, or give the model's inv_freq")


def _tables(model: Any) -> Iterator[Table]:
    """The frequencies of every rotary module: `inv_freq`, or `<layer type>_inv_freq` where layers differ."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if not name.endswith("inv_freq") or "original_" in name or buffer.dim() != 1:
                continue
            kind = getattr(module, "rope_type", "default")
            if isinstance(kind, Mapping):
                kind = kind.get(name.removesuffix("_inv_freq"), "default")
            yield Table(buffer.detach().to("cpu", torch.float32), str(kind))
