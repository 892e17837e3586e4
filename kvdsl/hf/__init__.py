"""transformers: a cache of packed bytes, and the attention that reads it where it lies.

    plug              `cache` and `use`: what a user calls
    layer             the library's layer protocol over one QuantizedCache a layer
    handle            what a layer hands to the attention: a tensor by name, a reference in fact
    attention         the registered attention function
    masks             the registered mask function
    tensor_parallel   which heads a rank has, where a model is cut over several
    rotary            the frequencies of a model's rotary positions, for keys that are stored without them
    observe           what the layers of a model are given, to calibrate on
    calibrating       what a scheme takes from data, of every layer of a model

transformers is imported when `cache` or `use` is first called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvdsl.extras import need

if TYPE_CHECKING:
    from .calibrating import measured, seen
    from .layer import PackedCache
    from .observe import observed, weighed
    from .plug import cache, use
    from .rotary import completed

__all__ = ["PackedCache", "cache", "completed", "measured", "observed", "seen", "use", "weighed"]
_HOME = {"cache": "plug", "use": "plug", "PackedCache": "layer", "completed": "rotary"}
_HOME |= {"observed": "observe", "weighed": "observe", "measured": "calibrating", "seen": "calibrating"}
OLDEST = "5.23"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require()
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def require() -> None:
    """MissingExtra without transformers, ImportError where it lacks what the cache protocol needs."""
    transformers = need("transformers", "hf")
    cache_utils = need("transformers.cache_utils", "hf")
    if not hasattr(cache_utils, "DummyLayer"):
        raise ImportError(
            f"transformers {transformers.__version__} has older caches, with other calls than these; "
            f"run: pip install 'transformers>={OLDEST}'"
        )
