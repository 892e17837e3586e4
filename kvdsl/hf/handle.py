"""What a layer hands to the attention function: by name a tensor, in fact a reference to one step of a packed cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree

if TYPE_CHECKING:
    from .layer import Step

Which = Literal["keys", "values"]


class Handle(torch.Tensor):
    """Looks like (B, H, tokens, D) and holds no numbers.

    The attention function takes `step` from it.  Any other code that computes with it gets the decoded numbers: right,
    slow, counted as a fallback and warned about once a cache.
    """

    step: Step
    which: Which

    @staticmethod
    def __new__(cls, step: Step, which: Which) -> Handle:
        like = step.keys if which == "keys" else step.values
        size = (*like.shape[:2], step.visible, like.shape[3])
        handle: Handle = torch.Tensor._make_wrapper_subclass(cls, size, dtype=like.dtype, device=like.device)
        handle.step, handle.which = step, which
        return handle

    def __init__(self, step: Step, which: Which) -> None:
        pass

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return func(*_pytree.tree_map(_real, args), **_pytree.tree_map(_real, kwargs or {}))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Handle({self.which}, shape={tuple(self.shape)}, dtype={self.dtype})"


def _real(x: Any) -> Any:
    return x.step.touched(x.which) if isinstance(x, Handle) else x


def step_of(keys: Tensor, values: Tensor) -> Step | None:
    """The step that both stand for; None where one of them is a plain tensor."""
    both = isinstance(keys, Handle) and isinstance(values, Handle) and keys.step is values.step
    return keys.step if both else None  # type: ignore[attr-defined]
