"""kvdsl: state how an LLM's KV cache is quantized; get proven kernels and a cache that plugs into models.

Importing this package loads neither torch nor triton: every name is fetched when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PLACES = {
    "scheme": ("ALL", "Additive",
               "Balance", "Bands", "Block", "ChannelScale", "ChannelShift", "Codebook", "DROP", "Eigenbasis",
               "Feedback", "Float", "Largest", "LowRank", "Origin", "Part", "Permute", "Polar", "PreRope", "Probes",
               "Recent", "Rotate", "Router", "Saliency", "Scale", "Scheme", "Shared", "Sinks", "Sketch", "Sparse",
               "Store", "Tier", "TopChannels", "Uniform", "Vectors", "per_channel", "per_tensor", "per_token"),
    "shape": ("Shape",),
    "errors": ("BackendError", "CacheError", "Fault", "ProofError", "SchemeError", "ShapeError"),
    "registry": ("load", "name_of", "names"),
    "cost": ("bits",),
    "codegen": ("build", "build_tiers"),
    "codegen.tuning": ("tune",),
    "api": ("attend", "calibrate", "roundtrip", "scores"),
    "routed_api": ("labels",),
    "hf": ("cache", "use"),
    "search_maps": ("search",),
    "pair_bits": ("basis_quotas", "head_quotas", "quotas"),
    "evaluation": ("evaluate",),
    "codegen.sweep_run": ("sweep",),
    "codegen.recommending": ("recommend",),
    "kernels": ("AttentionState", "KernelSet"),
}  # fmt: skip
_HOME = {name: module for module, names in _PLACES.items() for name in names}
_MODULES = ("codegen", "hf", "models", "reference", "schemes", "testing")

__all__ = sorted([*_HOME, *_MODULES])


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
