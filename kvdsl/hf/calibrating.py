"""What a scheme takes from data, measured on what a text gives each layer of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kvdsl.api import calibrate
from kvdsl.errors import SchemeError
from kvdsl.fisher import Gradients, weighted
from kvdsl.params import ROPE, of_all_layers, rope_of
from kvdsl.rules import layer_faults, refuse_for
from kvdsl.scheme import Scheme
from kvdsl.shape import Shape

from .observe import observed, weighed
from .rotary import completed
from .tensor_parallel import refuse_parts

Seen = tuple[Tensor, Tensor, Tensor | None, Gradients | None]
"""Keys and values (B, H, T, D) of one layer, its queries, a loss's derivatives by both where these are asked for."""


def seen(scheme: Scheme, model: Any, ids: Tensor) -> list[Seen]:
    """What every layer of the model holds of the tokens `ids` (1, N), as far as the scheme asks for it.  ValueError for
    a model of which this process has some heads."""
    refuse_parts(model)
    if any(weighted(own) for own in of_all_layers(scheme)):
        return [*weighed(model, ids)]
    return [(*layer, None) for layer in observed(model, ids)]


def measured(scheme: Scheme, model: Any, layers: Sequence[Seen]) -> dict[str, Tensor]:
    """kvdsl.calibrate of every layer's own scheme, the names behind "layers.<i>.", as `kvdsl.cache` takes them.

    Raises SchemeError for a scheme that does not fit the model's layers.
    """
    if found := layer_faults(scheme, len(layers)):
        raise SchemeError(found)
    known, numbers = completed(scheme, model, None), dict[str, Tensor]()
    for index, (keys, values, queries, gradients) in enumerate(layers):
        own = scheme.for_layer(index, len(layers))
        refuse_for(own, Shape(keys.shape[3], keys.shape[1]))
        rope = {ROPE: known[f"layers.{index}.{ROPE}"]} if rope_of(own) is not None else None
        found_here = calibrate(own, keys, values, queries, params=rope, gradients=gradients)
        numbers |= {f"layers.{index}.{name}": tensor for name, tensor in found_here.items()}
    return numbers
