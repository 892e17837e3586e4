"""A cache for one layer, of whatever kind its scheme asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from .errors import CacheError
from .head_cache import HeadCache, Held
from .head_groups import head_groups
from .kernels import Backend, Params
from .quantized_cache import QuantizedCache
from .scheme import Scheme
from .shape import Shape
from .tier_kernels import Build, TierKernels
from .tiered_cache import TieredCache

BuildTiers = Callable[[Scheme, Shape, Backend | None], TierKernels]
AnyCache = QuantizedCache | TieredCache | HeadCache


def refuse_invariant(scheme: Scheme, asked: bool) -> None:
    """CacheError for a scheme with tiers."""
    if asked and scheme.routed:
        raise CacheError(
            "batch_invariant: which tokens go to which tier follows from sums whose order depends on the batch; take a "
            "scheme without tiers"
        )


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
    have schemes of their own a HeadCache of these.  Other options as for QuantizedCache.
    """
    if scheme.heads:
        held = []
        for group in head_groups(scheme, shape.kv_heads):
            cache = made(
                group.scheme, shape.of_heads(len(group.heads)), batch, build, build_tiers, backend=backend,
                device=device, params=group.params(params or {}), window=window, **options,
            )  # fmt: skip
            held.append(Held(group, cache))
        return HeadCache(held)
    if scheme.routed:
        refuse_invariant(scheme, options.pop("batch_invariant", False))
        kernels = build_tiers(scheme, replace(shape, placed=window is not None), backend)
        return TieredCache(kernels, batch, device=device, params=params, window=window, **options)
    return QuantizedCache(build(scheme, shape, backend), batch, device=device, params=params, window=window, **options)
