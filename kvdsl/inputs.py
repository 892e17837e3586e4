"""What a cache refuses before it changes anything: each sentence names the tensor, its value and what would be
right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import ShapeError
from .shape import Shape

if TYPE_CHECKING:
    from .kernels import KernelSet, Side
    from .tier_kernels import TierKernels

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def refuse_tensor(name: str, tensor: Tensor, sizes: tuple[int | None, ...], shape: Shape, device: torch.device) -> None:
    """ShapeError unless `tensor` has these sizes (None: any), the kernels' dtype and device, and carries no
    gradient."""
    if not isinstance(tensor, Tensor):
        raise ShapeError(f"{name}: {type(tensor).__name__} is no tensor")
    if tensor.dim() != len(sizes) or any(s is not None and s != t for s, t in zip(sizes, tensor.shape, strict=True)):
        right = "(" + ", ".join("any" if size is None else str(size) for size in sizes) + ")"
        raise ShapeError(f"{name}: shape {tuple(tensor.shape)} is not (batch, heads, tokens, head_dim) = {right}")
    if tensor.dtype != DTYPES[shape.dtype]:
        raise ShapeError(
            f"{name}: {tensor.dtype} is not the kernels' {DTYPES[shape.dtype]}; convert it, or build for its dtype"
        )
    if tensor.device != device:
        raise ShapeError(f"{name}: it is on {tensor.device}, the cache on {device}; move it there")
    if tensor.requires_grad:
        raise ShapeError(
            f"{name}: it requires a gradient, which a cache would cut; run under torch.no_grad() or detach it"
        )


def checked_pair(
    keys: Tensor,
    values: Tensor,
    counts: Sequence[int] | None,
    batch: int,
    kernels: KernelSet | TierKernels,
    device: torch.device,
) -> tuple[int, ...]:
    """How many of a step's m tokens each sequence takes, all by default, of keys and values (B, H, m, D); ShapeError
    where one of these does not fit the cache or the other."""
    tensors: dict[Side, Tensor] = {"keys": keys, "values": values}
    for side, tensor in tensors.items():
        sizes = (batch, kernels.shape.kv_heads, None, kernels.dim(side))
        refuse_tensor(side, tensor, sizes, kernels.shape, device)
    chunk = keys.shape[2]
    if values.shape[2] != chunk:
        raise ShapeError(f"values: {values.shape[2]} tokens beside {chunk} of keys; give both the same")
    return (chunk,) * batch if counts is None else checked_counts("counts", counts, (chunk,) * batch)


def refuse_query(query: Tensor, batch: int, shape: Shape, device: torch.device) -> None:
    """ShapeError unless the query (B, Hq, Q, D) fits the cache."""
    refuse_tensor("query", query, (batch, shape.q_heads, None, shape.head_dim), shape, device)


def checked_counts(name: str, counts: Sequence[int], most: Sequence[int]) -> tuple[int, ...]:
    """Host integers, one a sequence, from 0 to most_b; else ShapeError."""
    values = tuple(counts)
    if len(values) != len(most):
        raise ShapeError(f"{name}: {len(values)} numbers for {len(most)} sequences")
    for b, (value, limit) in enumerate(zip(values, most, strict=True)):
        if type(value) is not int or not 0 <= value <= limit:
            raise ShapeError(f"{name}[{b}]: {value!r} is no integer from 0 to {limit}")
    return values


def checked_index(index: Sequence[int] | Tensor, batch: int) -> list[int]:
    """Sequence numbers on the host, each from 0 to batch - 1; else ShapeError.  A device tensor is waited for."""
    values = index.tolist() if isinstance(index, Tensor) else list(index)
    for place, value in enumerate(values):
        if type(value) is not int or not 0 <= value < batch:
            raise ShapeError(f"index[{place}]: {value!r} is no sequence from 0 to {batch - 1}")
    return values


def checked_number(name: str, value: int, least: int) -> None:
    """ShapeError unless `value` is an int of at least `least`."""
    if type(value) is not int or value < least:
        raise ShapeError(f"{name}: {value!r} is no integer of at least {least}")
