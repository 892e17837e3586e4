"""A cache for one layer, of whatever kind its scheme asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from .head_cache import Group, HeadCache, of_group, refuse_window
from .kernels import Backend, KernelSet, Params
from .quantized_cache import QuantizedCache
from .scheme import Scheme
from .shape import Shape
from .tier_kernels import TierKernels
from .tiered_cache import TieredCache

Build = Callable[[Scheme, Shape, Backend | None], KernelSet]
BuildTiers = Callable[[Scheme, Shape, Backend | None], TierKernels]
AnyCache = QuantizedCache | TieredCache | HeadCache


def made(
    scheme: Scheme,
    shape: Shape,
    batch: int,
    build: Build,
    build_tiers: BuildTiers,
    *,
    backend: Backend | None = None,
    device: torch.device | None = None,
    params: Params | None = None,
    window: int | None = None,
    **options: Any,
) -> AnyCache:
    """An empty cache of `batch` sequences: a QuantizedCache, where tokens go to tiers a TieredCache, and where heads
    have schemes of their own a HeadCache of these.  Other options as for QuantizedCache."""
    if scheme.heads:
        groups = []
        for heads, one in scheme.by_heads(shape.kv_heads):
            own = replace(shape, kv_heads=len(heads), q_heads=len(heads) * shape.group)
            numbers = of_group(params or {}, heads, any(one is listed for _, listed in scheme.heads))
            cache = made(
                one, own, batch, build, build_tiers, backend=backend, device=device, params=numbers, window=window,
                **options,
            )  # fmt: skip
            groups.append(Group(heads, cache))
        return HeadCache(groups)
    refuse_window(window, scheme.routed)
    if scheme.routed:
        return TieredCache(build_tiers(scheme, shape, backend), batch, device=device, params=params, **options)
    return QuantizedCache(build(scheme, shape, backend), batch, device=device, params=params, window=window, **options)
