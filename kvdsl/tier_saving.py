"""A cache with tiers copied, or pickled: the values that say what it holds, and what its kernels are built from."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .tiered_cache import TieredCache

HELD = ("front", "watch", "prompts", "prompt_query", "requantized", "_fresh", "_zeros")
"""What a cache with tiers holds beside these."""


def copied(cache: TieredCache, memo: dict[int, Any]) -> TieredCache:
    """A cache of its own with the same content and the same kernels."""
    return _filled(_empty(type(cache), cache.kernels, _options(cache)), copy.deepcopy(_state(cache), memo))


def reduced(cache: TieredCache) -> tuple[Any, ...]:
    """For pickle: the kernels are named by what they are built from."""
    built = (cache.kernels.scheme, cache.kernels.shape, cache.kernels.backend)
    return _rebuilt, (type(cache), built, _options(cache), _state(cache))


def _rebuilt(
    kind: type[TieredCache], built: tuple[Any, ...], options: dict[str, Any], state: dict[str, Any]
) -> TieredCache:
    from .codegen import build_tiers

    scheme, shape, backend = built
    return _filled(_empty(kind, build_tiers(scheme, shape, backend), options), state)


def _options(cache: TieredCache) -> dict[str, Any]:
    params = {name: x.cpu() for name, x in cache.params.items()}
    options = {"batch": cache.batch, "device": str(cache.device), "params": params, "capacity": cache.capacity}
    return options | {"window": cache.window}


def _empty(kind: type[TieredCache], kernels: Any, options: dict[str, Any]) -> TieredCache:
    options = dict(options)
    return kind(kernels, options.pop("batch"), **options)


def _state(cache: TieredCache) -> dict[str, Any]:
    tiers = [None if one is None else (one.cache, one.beside) for one in cache.tiers]
    return {name: getattr(cache, name) for name in HELD} | {"tiers": tiers}


def _filled(cache: TieredCache, state: dict[str, Any]) -> TieredCache:
    for one, held in zip(cache.tiers, state["tiers"], strict=True):
        if one is not None:
            one.cache, one.beside = held
    for name in HELD:
        setattr(cache, name, state[name])
    return cache
