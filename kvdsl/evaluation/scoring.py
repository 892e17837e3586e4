"""One unit through one packed cache, beside full precision: a row of plain numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvdsl.generation import continued
from kvdsl.hf.layer import PackedCache

from .filling import Prompt

Row = dict[str, Any]


def scored(prompt: Prompt, cache: PackedCache) -> Row:
    """Teacher-forced: every token behind the prompt is predicted from those before it, which stand in the cache.

    nll, full_nll    mean of -log p of the right token, in nats
    kl, same         of every token: KL(full || packed) in nats, and whether the same token is the likeliest
    hit, full_hit    share of tokens whose right one is the likeliest; 1 says that greedy generation gives them all
    """
    unit, full, weights = prompt.unit, prompt.expected, prompt.weights
    found = continued(prompt.model, prompt.ids, cache, context=unit.context, chunk=unit.chunk)
    target = prompt.ids[unit.context + 1 :, None]
    kl = (weights * (full - found)).sum(1)
    best, right = found.argmax(1), full.argmax(1)
    return {
        "nll": -found.gather(1, target).mean().item(),
        "full_nll": -full.gather(1, target).mean().item(),
        "kl": [float(f"{x:.6g}") for x in kl.tolist()],
        "same": (best == right).int().tolist(),
        "hit": (best == target[:, 0]).double().mean().item(),
        "full_hit": (right == target[:, 0]).double().mean().item(),
    }


def greedy(prompt: Prompt, cache: Any) -> list[int]:
    """The likeliest token, and so on, one by one, behind a prompt whose last token is put in first."""
    token, found = prompt.ids[prompt.unit.context], list[int]()
    for _ in range(prompt.unit.about["tokens"]):
        token = likeliest(prompt.model, token, cache)
        found.append(int(token))
    return found


def likeliest(model: Any, token: Tensor, cache: Any) -> Tensor:
    """The likeliest successor of one token, which joins what stands in the cache."""
    with torch.no_grad():
        logits: Tensor = model(input_ids=token[None, None], past_key_values=cache, use_cache=True).logits[0, -1]
    return logits.argmax()


def compared(tokens: list[int], expected: list[int]) -> Row:
    """tokens, full_tokens; same: share of places with the same one; first: the first place with another, or None."""
    equal = [a == b for a, b in zip(tokens, expected, strict=True)]
    first = next((i for i, same in enumerate(equal) if not same), None)
    return {"tokens": tokens, "full_tokens": expected, "same": sum(equal) / len(equal), "first": first}


def reads(cache: PackedCache) -> dict[str, Any]:
    """How a cache was read, see PackedCache.stats, the backend that did it, and bits held for each number."""
    stats = cache.stats()
    counts = {name: stats[name] for name in ("packed_calls", "fresh_calls", "dense_calls", "fallbacks")}
    return {**counts, "backend": backend_of(cache), "bits": stats["bits"]}


def backend_of(cache: PackedCache) -> str:
    """The backend of the first layer that holds tokens."""
    packed = next(layer.packed for layer in cache.packed_layers if layer.packed is not None)
    while hasattr(packed, "groups"):
        packed = packed.groups[0].cache
    return str(packed.kernels.backend)
