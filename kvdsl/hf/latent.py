"""Models with multi-head latent attention: what their layers cache is a record, and their up-projections move.

Such a module caches a latent c and a key r with rotary positions, and makes keys (U c, r) and values V c of both for
every head.  Scores are q'.(U c) + q''.r = (U^T q').c + q''.r, and outputs sum p V c = V sum p c: so a packed cache of
records meets (U^T q', q''), and its outputs go through V.  Nothing is expanded but a first prompt, which attends to its
own keys and values as they come.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvdsl.scheme import Scheme

from .handle import step_of
from .layer import Step

EXPAND = "expand_kv"
"""What such a module makes keys and values of its cache with; an attribute of this name in front of it lets handles
through."""


def modules(model: Any) -> list[Any]:
    """The attention modules that cache a latent."""
    inside = model.modules() if hasattr(model, "modules") else ()
    return [one for one in inside if hasattr(type(one), EXPAND) and hasattr(one, "kv_b_proj")]


def refuse_others(scheme: Scheme, model: Any) -> None:
    """ValueError for a scheme of pairs and a model of latents, or the other way round."""
    found = modules(model)
    if scheme.shared and not found:
        raise ValueError(
            "model: it has no latent that is key and value at once, which shared values are; take a scheme that stores "
            "keys and values"
        )
    if found and not scheme.shared:
        size = found[0].kv_lora_rank + found[0].qk_rope_head_dim
        raise ValueError(
            f"model: it caches a record of {size} numbers a token, no keys and values; take a scheme of shared values, "
            "as mla_fp8"
        )


def pass_handles(model: Any) -> None:
    """Let the modules hand on what a packed cache gives them, as it is."""
    for module in modules(model):
        if EXPAND not in vars(module):
            object.__setattr__(module, EXPAND, _passing(getattr(module, EXPAND)))


def restore(model: Any) -> None:
    """Undo `pass_handles`."""
    for module in modules(model):
        vars(module).pop(EXPAND, None)


def _passing(expand: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Any:
    def handed_on(latent: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
        return expand(latent, rotary) if step_of(latent, rotary) is None else (latent, rotary)

    return handed_on


class Absorbed(NamedTuple):
    """One attention call of such a module over records: U (Hq, n, D) and V (Hq, v, D) of its heads."""

    module: Any
    keys: Tensor
    values: Tensor

    @classmethod
    def of(cls, module: Any) -> Absorbed:
        """Of a module whose up-projection is a plain matrix; ValueError for others."""
        weight = getattr(module.kv_b_proj, "weight", None)
        if not isinstance(weight, Tensor) or not weight.is_floating_point() or module.kv_b_proj.bias is not None:
            raise ValueError("model: kv_b_proj is no plain matrix of floats; load the model without quantizing it")
        heads = weight.view(-1, module.qk_nope_head_dim + module.v_head_dim, weight.shape[1])
        return cls(module, *heads.split([module.qk_nope_head_dim, module.v_head_dim], 1))

    def query(self, query: Tensor) -> Tensor:
        """What meets a record, (B, Hq, Q, D), of a query (B, Hq, Q, n + r)."""
        before, rotary = query.split([self.keys.shape[1], query.shape[3] - self.keys.shape[1]], -1)
        return torch.cat((before @ self.keys, rotary), -1)

    def out(self, out: Tensor) -> Tensor:
        """The heads' outputs (B, Q, Hq, v) of sums of latents (B, Q, Hq, D)."""
        return (out.transpose(1, 2) @ self.values.mT).transpose(1, 2).contiguous()

    def fresh(self, step: Step) -> tuple[Tensor, Tensor]:
        """Keys and values of all heads, of a step's own records."""
        latent = step.values
        keys, values = getattr(type(self.module), EXPAND)(self.module, latent, step.keys[..., latent.shape[3] :])
        return keys, values
