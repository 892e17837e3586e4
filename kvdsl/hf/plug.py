"""`cache` and `use`: how a model comes to generate through a packed cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import (
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from kvdsl.errors import SchemeError, ShapeError
from kvdsl.head_shares import HeadShare, params_of, refuse_spanning, scheme_of
from kvdsl.kernels import Backend, Params
from kvdsl.making import refuse_invariant
from kvdsl.params import checked, missing, wanted, within
from kvdsl.registry import load
from kvdsl.rules import layer_faults, refuse_for
from kvdsl.scheme import Scheme
from kvdsl.shape import Shape

from . import latent
from .attention import attention
from .layer import PackedCache, PackedLayer
from .masks import mask
from .rotary import completed
from .static import StaticLayer
from .tensor_parallel import shares

NAME = "kvdsl"
OWN_MASKS = frozenset({"doge"})
"""Families that compute masks of their own from the one they are given, which must then be the full one."""
AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)


def cache(
    scheme: Scheme | str,
    model: Any,
    *,
    params: Params | None = None,
    backend: Backend | None = None,
    capacity: int | None = None,
    static: bool = False,
    batch_invariant: bool = False,
) -> PackedCache:
    """A cache for `model`, to be passed as `past_key_values`; the model's attention is set to the one that reads it.

    scheme    a Scheme, or whatever kvdsl.load takes; a layer uses `scheme.for_layer`
    params    calibrated parameters: names of one layer's kernels, or the same behind "layers.<i>."; rotary frequencies
              of a scheme with PreRope are the model's, and given ones are held against them
    backend   "triton" or "torch"; default by the device of the model
    capacity  tokens a sequence for which address space is reserved
    static    tokens behind a prompt go in place, up to `capacity` a sequence: `generate()` compiles the step where it
              compiles any, and a CUDA graph holds it
    batch_invariant   attention over the cache gives a sequence what it gives it alone, to the bit, whatever batch it is
              in (the model's own products are the model's affair); not of schemes with tiers, CacheError

    Of a model over several ranks (`tp_plan`) every rank calls it with the same scheme and params, those of all heads,
    and caches its own heads.

    Raises ValueError for a model with layers whose state is no pair of keys and values of one head size, or whose RoPE
    PreRope cannot take off, SchemeError for a scheme that does not fit its heads or layers, or takes something from
    heads of several ranks, ShapeError for calibrated parameters that are missing or do not fit.
    """
    scheme = load(scheme)
    return _cache(scheme, model, completed(scheme, model, params), Options(backend, capacity, static, batch_invariant))


class Options(NamedTuple):
    """What is asked of the layers of a cache; see `cache`."""

    backend: Backend | None
    capacity: int | None
    static: bool
    batch_invariant: bool


def _cache(scheme: Scheme, model: Any, params: Params, options: Options) -> PackedCache:
    """`cache`, given all parameters."""
    layers, calls = _layers(scheme, model, params, options)
    latent.pass_handles(model)
    if model.config._attn_implementation != NAME:
        model.set_attn_implementation(NAME)
    return PackedCache(layers, scheme, calls)


def _layers(scheme: Scheme, model: Any, params: Params, asked: Options) -> tuple[list[Any], Counter[str]]:
    """A packed layer where the library would have a dynamic one; layers without keys and values stay the library's."""
    config = model.config.get_text_config(decoder=True)
    if config.model_type in OWN_MASKS:
        raise ValueError(f"model: {config.model_type} makes attention masks of its own; a packed cache cannot serve it")
    latent.refuse_others(scheme, model)
    theirs = DynamicCache(config=config).layers or [DynamicLayer()] * config.num_hidden_layers  # type: ignore[no-untyped-call]
    if found := layer_faults(scheme, len(theirs)):
        raise SchemeError(found)
    calls: Counter[str] = Counter()
    layers: list[Any] = []
    for index, (layer, share) in enumerate(zip(theirs, shares(model, len(theirs)), strict=True)):
        if type(layer) in (DummyLayer, LinearAttentionLayer):
            layers.append(layer)
            continue
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise ValueError(
                f"model: layer {index} keeps a {type(layer).__name__}, which is no plain pair of keys and values"
            )
        own, numbers = scheme.for_layer(index, len(theirs)), _of_layer(params, index)
        refuse_invariant(own, asked.batch_invariant)
        _refuse_unfit(own, numbers, config, index, share)
        room = _refuse_moving(own, asked.capacity, index) if asked.static else 0
        heads = getattr(config, "num_attention_heads", None)
        if share is not None:
            own, numbers = scheme_of(own, share), params_of(own, share, numbers)
            heads = heads // share.ranks if isinstance(heads, int) else None
        options: dict[str, Any] = dict(
            window=getattr(layer, "sliding_window", None),
            params=numbers,
            backend=asked.backend,
            batch_invariant=asked.batch_invariant,
            heads=heads,
            kv_heads=None if share is None else share.count,
            softcap=getattr(config, "attn_logit_softcapping", None) is not None,
            calls=calls,
        )
        if asked.static:
            before = [other for other in layers if isinstance(other, StaticLayer)]
            layers.append(StaticLayer(own, capacity=room, before=before, **options))
        else:
            layers.append(PackedLayer(own, capacity=asked.capacity, **options))
    return layers, calls


def _refuse_moving(scheme: Scheme, capacity: int | None, index: int) -> int:
    """The capacity; ValueError without one, or for a scheme whose tokens move by what the host decides."""
    if capacity is None:
        raise ValueError("static: no capacity; say how many tokens a sequence may have, prompt included")
    if scheme.routed or scheme.heads:
        raise ValueError(f"static: layer {index} sends tokens to tiers, which the host decides; leave static out")
    if scheme.shared:
        raise ValueError(f"static: layer {index} keeps latents, which are not appended in place; leave static out")
    if scheme.keys.rope is not None:
        raise ValueError(f"static: layer {index} packs keys without their positions (PreRope); leave static out")
    return capacity


def _of_layer(params: Params, index: int) -> Params:
    """The parameters of one layer: those behind its prefix, and those without any."""
    prefix = f"layers.{index}."
    common = {name: value for name, value in params.items() if not name.startswith("layers.")}
    return common | within(params, prefix)


def _refuse_unfit(scheme: Scheme, params: Params, config: Any, index: int, share: HeadShare | None) -> None:
    """SchemeError where a layer's scheme does not fit the model's heads, or those of a rank, ShapeError where it lacks
    calibrated numbers or has others than fit.

    Of a model whose layers differ in their heads only what is missing is seen here; the rest when tokens come."""
    heads = getattr(config, "num_attention_heads", None)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None)
    if scheme.shared:
        kv_heads, width = 1, config.kv_lora_rank + config.qk_rope_head_dim
    if width is None and isinstance(heads, int):
        width = getattr(config, "hidden_size", 0) // heads
    try:
        if isinstance(kv_heads, int) and isinstance(width, int) and not hasattr(config, "global_head_dim"):
            shape = Shape(width, kv_heads)
            refuse_for(scheme, shape)
            refuse_spanning(scheme, share)
            checked(scheme, shape, params)
            return
        refuse_spanning(scheme, share)
        if lacking := [name for name in wanted(scheme, Shape(64)) if name not in params]:
            raise ShapeError(missing(scheme, lacking[0]))
    except ShapeError as error:
        measured = "; `kvdsl calibrate` measures those of a model" if "missing" in str(error) else ""
        raise ShapeError(f"layer {index}: {error}{measured}") from None


class Use:
    """What `use` yields: `cache` is that of the newest generate() call, None before the first."""

    def __init__(self) -> None:
        self.cache: PackedCache | None = None


@contextmanager
def use(
    model: Any,
    scheme: Scheme | str,
    *,
    params: Params | None = None,
    backend: Backend | None = None,
    capacity: int | None = None,
    static: bool = False,
    batch_invariant: bool = False,
) -> Iterator[Use]:
    """Inside, every `model.generate()` given no cache gets a fresh one of `scheme`; afterwards the model is as before.

    Arguments as for `cache`.
    """
    loaded = load(scheme)
    before = implementations(model)
    had, own = "generate" in vars(model), vars(model).get("generate")
    plain = model.generate
    used, ready = Use(), completed(loaded, model, params)
    options = Options(backend, capacity, static, batch_invariant)

    def generate(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("past_key_values") is None and kwargs.get("use_cache", True):
            used.cache = _cache(loaded, model, ready, options)
            kwargs["past_key_values"] = used.cache
        return plain(*args, **kwargs)

    try:
        _layers(loaded, model, ready, options)
        model.set_attn_implementation(NAME)
        object.__setattr__(model, "generate", generate)
        yield used
    finally:
        if had:
            object.__setattr__(model, "generate", own)
        else:
            vars(model).pop("generate", None)
        latent.restore(model)
        restore(before)


def implementations(model: Any) -> list[tuple[Any, str]]:
    """Every config in the model with its attention implementation."""
    found: dict[int, Any] = {}
    waiting = [model.config, *(m.config for m in model.modules() if hasattr(m, "config"))]
    while waiting:
        config = waiting.pop()
        if id(config) not in found and hasattr(config, "_attn_implementation_internal"):
            found[id(config)] = config
            waiting += [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    return [(config, config._attn_implementation_internal) for config in found.values()]


def restore(before: list[tuple[Any, str]]) -> None:
    """What `implementations` found, as it was."""
    for config, name in before:
        config._attn_implementation_internal = name
