"""Masks: what the packed attention needs to know of them is only which tokens are padding.

Causality and sliding windows come from positions.  Any other pattern (prefix LM, image blocks, packed sequences) is
returned as the library's full mask, and the attention falls back to decoded keys and values for it, which it says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask, sliding_window_causal_mask_function


@dataclass(frozen=True)
class Padding:
    """What a (B, 1, 1, K) mask made here says, on the host: tokens that are no padding, of each sequence.

    counts   among the fresh tokens
    real     among all tokens
    order    None where padding stands before the fresh tokens, else the stable permutation (B, Q) that puts it there
    """

    counts: tuple[int, ...]
    real: tuple[int, ...]
    order: Tensor | None
    gives: Callable[[], Tensor]

    def full(self) -> Tensor:
        """The library's bool (B, 1, Q, K) mask of the same meaning."""
        return self.gives()


def padding_of(mask: Tensor | None) -> Padding | None:
    """The Padding that travels on a mask made here; None for another's mask."""
    return getattr(mask, "kvdsl_padding", None)


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask function registered with transformers.

    None: causal (or sliding), nothing padded.
    (B, 1, 1, K) bool carrying a Padding: causal (or sliding) and padded.
    (B, 1, Q, K) bool, or what the library makes of it: everything else.
    """

    if isinstance(q_offset, Tensor):  # of a cache that counts on the device: what it holds is no padding
        if q_length == 1 and (mask_function is causal_mask_function or local_size is not None):
            return None
        q_offset = int(q_offset)
        kv_length = q_offset + q_length

    def full(**changes: Any) -> Tensor | None:
        arguments = dict(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
        )
        made: Tensor | None = sdpa_mask(**{**arguments, **kwargs, **changes})
        return made

    pattern = mask_function is causal_mask_function or (
        local_size is not None and alike(mask_function, sliding_window_causal_mask_function(local_size))
    )
    ends_with_queries = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    if not pattern or not ends_with_queries:
        return full()
    if attention_mask is None:
        return None
    total = q_offset + q_length
    if attention_mask.shape[-1] < total:
        return full(allow_is_causal_skip=False)
    seen = attention_mask[:, :total].to(torch.bool)
    fresh = seen[:, q_offset:]
    # Visible tokens in a chunk, visible tokens in all, and whether padding stands only before them: one transfer.
    ordered = (fresh[:, 1:] >= fresh[:, :-1]).all(1)
    counts, real, left = torch.stack([fresh.sum(1), seen.sum(1), ordered.to(torch.int64)]).tolist()
    if min(real) == total:
        return None
    order = None if all(left) else fresh.to(torch.uint8).argsort(dim=1, stable=True)
    row = seen[:, None, None, kv_offset:]

    def whole() -> Tensor:
        made = full(allow_is_causal_skip=False)
        assert made is not None
        return made

    row.kvdsl_padding = Padding(tuple(counts), tuple(real), order, whole)  # type: ignore[attr-defined]
    return row


def alike(a: Any, b: Any) -> bool:
    """Whether two functions have the same code and close over the same things."""
    if a is b:
        return True
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(alike, a, b))
    if not (hasattr(a, "__code__") and hasattr(b, "__code__")):
        return type(a) is type(b) is int and a == b
    inside = [tuple(cell.cell_contents for cell in f.__closure__ or ()) for f in (a, b)]
    return a.__code__ is b.__code__ and alike(*inside)
