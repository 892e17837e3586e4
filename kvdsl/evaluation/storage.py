"""What a model's cache takes, counted from the spec and measured in bytes by what they hold, over lengths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from kvdsl.cost import bits, page_parts
from kvdsl.hf import cache as packed_cache
from kvdsl.inputs import DTYPES
from kvdsl.kernels import Backend, Params
from kvdsl.quantized_cache import QuantizedCache
from kvdsl.scheme import SIDES, Scheme, Side
from kvdsl.shape import Shape
from kvdsl.tiered_cache import TieredCache
from kvdsl.window import windows

from .filling import put

PARTS = ("code", "metadata", "index", "padding", "window", "labels", "tables", "reserved")
COUNTED = ("mean", "keys", "values", "code", "metadata", "padding", "window")


def stored(scheme: Scheme, model: Any, tokens: int, params: Params | None, backend: Backend | None) -> dict[str, Any]:
    """The bytes of all layers of a cache that was given a prompt of so many tokens: nbytes, and `parts` that add up to
    it, by PARTS; `constants`, calibrated numbers, which all sequences share and nbytes leaves out; `counted`, bits an
    element by kvdsl.bits at this length, exact tokens at 16; `bits`, nbytes over the numbers of keys and values.

    Tokens are random numbers: bytes do not depend on them.  Layers that are alike are made once.
    """
    cache = packed_cache(scheme, model, params=params, backend=backend)
    shape = shape_of(model)
    assert shape.q_heads is not None
    generator = torch.Generator().manual_seed(0)
    sizes = ((shape.kv_heads, tokens), (shape.kv_heads, tokens), (shape.q_heads, tokens))
    tensors = [torch.randn(1, heads, count, shape.head_dim, generator=generator) for heads, count in sizes]
    keys, values, queries = (x.to(model.device, DTYPES[shape.dtype]) for x in tensors)
    if scheme.shared:  # as such a model caches them: latents, and keys with positions
        size = scheme.dim("values", shape.head_dim)
        keys, values = keys[..., :size], keys[..., size:]
    count, known = len(cache.layers), dict[tuple[str, int | None], dict[str, int]]()
    parts, constants, mine = Counter[str](), 0, 0
    for index, layer in enumerate(cache.layers):
        if layer not in cache.packed_layers:
            continue
        mine += 1
        kind = (scheme.for_layer(index, count).hash, layer.window)
        if kind not in known:
            put(cache, index, keys, values, queries)
            known[kind] = parts_of(layer.packed)
            assert sum(known[kind].values()) == layer.packed.nbytes
            layer.reset()
        parts.update(known[kind])
        constants += sum(x.nbytes for x in (layer.params or {}).values())
    numbers = 2 * shape.kv_heads * shape.head_dim * tokens * mine
    said = bits(scheme, shape.head_dim, shape.kv_heads, tokens=tokens, layers=count)
    return {
        "tokens": tokens,
        "nbytes": sum(parts.values()),
        "bits": 8 * sum(parts.values()) / numbers,
        "parts": {name: parts[name] for name in PARTS},
        "constants": constants,
        "counted": {name: getattr(said, name) for name in COUNTED},
    }


def series(
    scheme: Scheme, model: Any, sizes: Sequence[int], params: Params | None, backend: Backend | None
) -> list[dict[str, Any]]:
    """`stored` at every length."""
    return [stored(scheme, model, tokens, params, backend) for tokens in sizes]


def parts_of(cache: Any) -> dict[str, int]:
    """The bytes of one layer's cache, by what they hold; their sum is its nbytes.

    code, metadata   of packed tokens: codes; scales and offsets, and what tiers have measured of their channels
    index            where single numbers and chosen channels stand
    padding          what aligning the sections of their pages adds
    window           exact rows that hold a token
    labels           of tiers: where each token stood, sums that are carried on, queries that a router keeps, and what a
                     prompt's queries weigh
    tables           which page stands where, and counts
    reserved         places of pages, and exact rows, that hold no token yet; the page of zeros
    """
    found = Counter(dict.fromkeys(PARTS, 0))
    if isinstance(cache, QuantizedCache):
        found.update(_plain(cache))
    elif isinstance(cache, TieredCache):
        front = cache.front
        row = front.keys.shape[1] * front.keys.shape[3] * front.keys.element_size()
        window = 2 * sum(front.held) * row
        found["window"] += window
        found["reserved"] += front.keys.nbytes + front.values.nbytes - window
        found["labels"] += front.sums.nbytes + cache.watch.nbytes
        kept = [one for one in cache.tiers if one is not None]
        for one in kept:
            found.update(_plain(one.cache))
            found["labels"] += one.routing_bytes + one.beside.weights.nbytes
            found["metadata"] += sum(x.nbytes for x in one.beside.affine.values())
        found["tables"] += cache.nbytes - front.nbytes - cache.watch.nbytes - sum(one.nbytes for one in kept)
    else:
        for group in cache.groups:
            found.update(parts_of(group.cache))
    return dict(found)


def _plain(cache: QuantizedCache) -> dict[str, int]:
    shape, found = cache.kernels.shape, Counter[str]()
    pages = 1 + len(set(cache.held()))
    each = page_parts(cache.kernels.scheme, shape)
    element = next(iter(cache.rows(side) for side in SIDES)).element_size()
    filled = rows = 0
    for side in SIDES:
        packed = sum(cache.packed(side))
        for name, part in each[side].items():
            size = part * packed * shape.kv_heads * shape.head_dim / 8
            found[name] += int(size)
            filled += int(size)
        exact = sum(cache.lengths) - packed
        found["window"] += exact * shape.kv_heads * cache.kernels.dim(side) * element
        rows += cache.rows(side).nbytes
    found["reserved"] = pages * cache.pool.page_bytes - filled + rows - found["window"]
    found["tables"] = cache.nbytes - pages * cache.pool.page_bytes - rows
    return dict(found)


def shape_of(model: Any) -> Shape:
    """Heads and their size, and the dtype of the model's numbers.  Of a model whose layers differ, the first's; of one
    that caches latents that of its records."""
    from kvdsl.hf import latent
    from kvdsl.hf.layer import FORMATS

    config = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    softcap = getattr(config, "attn_logit_softcapping", None) is not None
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if latent.modules(model):
        kv_heads, width = 1, config.kv_lora_rank + config.qk_rope_head_dim
    return Shape(width, kv_heads, heads, FORMATS[model.dtype], softcap)


def formula(scheme: Scheme, side: Side, shape: Shape) -> str:
    """Bits of a number of one side at T tokens, in words: those of packed tokens, and which tokens are exact."""
    said = bits(scheme, shape.head_dim, shape.kv_heads).formula(side)
    if scheme.heads:
        return said
    window = windows(scheme)[side]
    behind = f"max(0, T - {window.sinks})" if window.sinks else "T"
    if scheme.routed:
        waiting = 0 if scheme.recent is None else scheme.recent.tokens
        whole = scheme.recent is not None and scheme.recent.flush == "whole"
        if waiting:
            held = f"{behind} mod {waiting}" if whole else f"min({behind}, {waiting})"
            held = f"{window.sinks} + {held}" if window.sinks else held
        else:
            held = str(window.sinks)
        return f"{said} in tiers, for T - E tokens; 16 bits for E = {held} exact ones, while no more wait to be sent"
    if window.whole:
        packed = behind if window.recent <= 1 else f"floor({behind}/{window.recent}) x {window.recent}"
    else:
        packed = f"max(0, T - {window.sinks + window.recent})" if window.recent else behind
    if packed == "T":
        return f"{said}, for all T tokens"
    return f"{said} for P = {packed} packed tokens of T, 16 bits for the T - P others"
