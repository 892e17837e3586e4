"""What a context over several ranks refuses: schemes whose parts need all tokens, caches that are no part of one."""

from __future__ import annotations

import hashlib

import torch

from .errors import CacheError, Fault, SchemeError, ShapeError
from .inputs import checked_number
from .params import wanted
from .quantized_cache import QuantizedCache
from .scheme import Scheme


def faults(scheme: Scheme, *, placed: bool = False) -> tuple[Fault, ...]:
    """Why tokens of a scheme cannot be spread over ranks; none where they can.  `placed`: kernels are told where every
    token stands (Shape.placed)."""
    found = []
    if scheme.heads:
        fact = "a layer under a table of heads is several caches"
        found.append(Fault("heads", fact, "give each group of like heads a cache of its own"))
    if scheme.router is not None:
        fact = f"{type(scheme.router).__name__} ranks all tokens of a sequence, and a rank has some of them"
        found.append(Fault("router", fact, "use a scheme without tiers, or keep all tokens on one rank"))
    elif scheme.tiers:
        fact = "what a tier holds depends on all tokens of a sequence, and a rank has some of them"
        found.append(Fault("tiers", fact, "use a scheme without tiers, or keep all tokens on one rank"))
    if scheme.shared:
        fact = "ranks exchange outputs of a key's length, and shared values are shorter"
        found.append(Fault("values.code", fact, "keep records on one rank, and divide the query heads among ranks"))
    if scheme.requantize != "never":
        fact = f"{scheme.requantize!r} measures all stored tokens anew at every flush, and a rank has some of them"
        found.append(Fault("requantize", fact, "use 'never', with scales of single tokens or of groups of them"))
    if scheme.keys.rope is not None and not placed:
        fact = "PreRope packs a key by its place in the sequence, and a rank's kernels count its own tokens"
        found.append(
            Fault("keys.transform", fact, "build for a shape with placed=True: such kernels are told its place")
        )
    return tuple(found)


def refuse_other(cache: object) -> None:
    """SchemeError or CacheError for what is no QuantizedCache: whatever the other ranks have, it is no part of one."""
    if not isinstance(cache, QuantizedCache):
        scheme = getattr(getattr(cache, "kernels", None), "scheme", None)
        if isinstance(scheme, Scheme) and (found := faults(scheme)):
            raise SchemeError(found)
        raise CacheError(
            f"cache: {type(cache).__name__} is no QuantizedCache; give one, of heads under a table of schemes one for "
            "each group of like heads"
        )


def refuse(cache: QuantizedCache, turn: int | None) -> None:
    """SchemeError, CacheError or ShapeError for a cache whose tokens cannot be spread, or not in such turns."""
    found = faults(cache.kernels.scheme, placed=cache.kernels.shape.placed)
    if found:
        raise SchemeError(found)
    if any(cache.lengths):
        raise CacheError(f"cache: it holds {sum(cache.lengths)} tokens already; give one that is empty")
    if cache.window is not None:
        raise CacheError(
            f"window: a layer that sees {cache.window} tokens holds no more, so there is nothing to spread; "
            "give every rank a QuantizedCache of it"
        )
    if turn is not None:
        checked_number("turn", turn, 1)
        if turn % cache.kernels.page_tokens:
            size = cache.kernels.page_tokens
            raise ShapeError(f"turn: {turn} tokens are no whole number of pages of {size}; give a multiple of it")


def digest(cache: QuantizedCache) -> str:
    """Of the calibrated numbers that the scheme wants."""
    found = hashlib.blake2b(digest_size=16)
    for name in sorted(wanted(cache.kernels.scheme, cache.kernels.shape)):
        if name in cache.params:
            found.update(
                name.encode() + bytes(cache.params[name].cpu().contiguous().view(torch.uint8).flatten().tolist())
            )
    return found.hexdigest()
