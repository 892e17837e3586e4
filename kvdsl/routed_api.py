"""`roundtrip`, `scores`, `attend` and `calibrate` of schemes with tiers, and the labels that a router gives."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .errors import Fault, SchemeError, ShapeError
from .fisher import Gradients
from .inputs import refuse_tensor
from .kernels import Backend, Params
from .routing import column
from .scheme import SIDES, Saliency, Scheme
from .segments import segments, unwindowed
from .shape import Shape
from .tier_contents import held
from .tier_params import of_tier
from .tiered_cache import TieredCache


def labels(
    scheme: Scheme, q: Tensor, k: Tensor, v: Tensor, *, backend: Backend | None = None, params: Params | None = None
) -> Tensor:
    """The tier that the router of a scheme sends each token of a prompt to: int64 (B, H, T), -1 where it stays exact.

    q (B, Hq, T, D), k and v (B, H, T, D): the prompt, in one step.  Raises ShapeError (a tensor), SchemeError (a scheme
    without tiers, or one that does not fit the shape), BackendError.
    """
    if not scheme.routed:
        raise SchemeError(
            (Fault("tiers", "there are none, so that no token is sent anywhere", "add tiers and a router"),)
        )
    with torch.no_grad():
        cache, _ = _filled(scheme, k, v, q, backend, True, params, None, q, k.shape[2])
        return cache.labels.to(k.device)


def roundtrip(
    scheme: Scheme, k: Tensor, v: Tensor, backend: Backend | None, window: bool, params: Params | None,
    choice: Tensor | None, queries: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `kvdsl.roundtrip`."""
    cache, _ = _filled(scheme, k, v, None, backend, window, params, choice, queries, k.shape[2])
    keys, values = (held(cache, side, torch.float32)[0].to(k.device) for side in SIDES)
    return keys, values


def scores(
    scheme: Scheme, q: Tensor, k: Tensor, backend: Backend | None, window: bool, params: Params | None,
    choice: Tensor | None, queries: Tensor | None,
) -> Tensor:  # fmt: skip
    """See `kvdsl.scores`."""
    cache, query = _filled(scheme, k, k, q, backend, window, params, choice, queries, k.shape[2])
    assert query is not None
    group = query.shape[1] // k.shape[1]
    numbers, _ = held(cache, "keys", torch.float32)
    found = query.float() @ numbers.repeat_interleave(group, 1).mT
    for tier in cache.tiers:
        if tier is None:
            continue
        read, most = tier.read(), max(tier.cache.packed("keys"), default=0)
        if most:
            met, bias = (query, None) if read.keys is None else read.keys.met(query)
            state, places = read.state, read.state.places
            own = read.kernels.scores(met.contiguous(), state.pool, state.table, most, read.params, places)
            own = own if bias is None else own + bias[..., None]
            at = tier.beside.positions[:, :, :most].long() + cache.front.sinks
            valid = torch.arange(most, device=at.device) < column(tier.cache.packed("keys"), at.device)
            at = torch.where(valid[:, None], at, k.shape[2]).repeat_interleave(group, 1)[:, :, None].expand_as(own)
            found = torch.nn.functional.pad(found, (0, 1)).scatter(3, at, own)[..., :-1]
    return found.to(k.device)


def attend(
    scheme: Scheme, q: Tensor, k: Tensor, v: Tensor, backend: Backend | None, scale: float | None, window: bool,
    params: Params | None, choice: Tensor | None, queries: Tensor | None, softcap: float | None, sliding: int | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `kvdsl.attend`."""
    if q.shape[2] > k.shape[2]:
        raise ShapeError(
            f"q: {q.shape[2]} queries for {k.shape[2]} tokens; they belong to the last tokens, give at most those"
        )
    old = k.shape[2] - q.shape[2]
    capped = softcap is not None
    cache, query = _filled(scheme, k, v, q, backend, window, params, choice, queries, old, capped, sliding)
    assert query is not None
    fresh = (x[:, :, old:].to(cache.device) for x in (k, v))
    step = cache.append(*fresh, scaling=k.shape[3] ** -0.5 if scale is None else scale, softcap=softcap)
    out, lse = cache.attend(query, step)
    return out.to(k.device), lse.to(k.device)


def calibrate(
    scheme: Scheme, k: Tensor, v: Tensor, q: Tensor | None, params: Params | None, gradients: Gradients | None
) -> dict[str, Tensor]:
    """See `kvdsl.calibrate`: of every tier what it takes from data, over all tokens."""
    from .api import calibrate as plain
    from .params import wanted

    shape, found = Shape(k.shape[3], k.shape[1]), dict[str, Tensor]()
    names = wanted(scheme, shape)
    for number, one in enumerate(segments(scheme)):
        prefix = f"tiers[{number}]."
        if one.scheme is not None and any(name.startswith(prefix) for name in names):
            own = plain(one.scheme, k, v, q, params=of_tier(params or {}, number), gradients=gradients)
            found |= {prefix + name: x for name, x in own.items() if prefix + name in names}
    return found


def _filled(
    scheme: Scheme, k: Tensor, v: Tensor, q: Tensor | None, backend: Backend | None, window: bool,
    params: Params | None, choice: Tensor | None, queries: Tensor | None, tokens: int, softcap: bool = False,
    sliding: int | None = None,
) -> tuple[TieredCache, Tensor | None]:  # fmt: skip
    """A cache given the first `tokens` tokens in one step, routed by labels (B, H, T), by positions, by the tokens, or
    by `queries` (B, Hq, T, D) of all of them."""
    from .api import _device, _shape
    from .codegen import build_tiers

    shape = replace(_shape(k, queries if q is None else q), softcap=softcap)
    refuse_tensor("k", k, tuple(k.shape), shape, k.device)
    refuse_tensor("v", v, tuple(k.shape), shape, k.device)
    for name, x, size in (("q", q, None), ("queries", queries, k.shape[2])):
        if x is not None:
            refuse_tensor(name, x, (k.shape[0], shape.q_heads, size, k.shape[3]), shape, k.device)
    stored = scheme if window else unwindowed(scheme)
    why = next((one.asks for one in segments(stored) if one.asks), "")
    asks = isinstance(stored.router, Saliency) and choice is None
    if choice is not None:
        _checked_labels(stored, choice, k)
    if queries is None and (asks or why):
        mend = "" if why else ", or labels=kvdsl.labels(scheme, q, k, v)"
        why = "the router goes by attention" if asks else why
        raise ShapeError(f"queries: missing; {why}, give those of all tokens, (B, Hq, T, D){mend}")
    kernels = build_tiers(stored, replace(shape, placed=sliding is not None), backend)
    device = _device(kernels.exact, k)
    size = max(1, k.shape[2])
    cache = TieredCache(kernels, k.shape[0], device=device, params=params, window=sliding, capacity=size)
    keys, values = (x[:, :, :tokens].to(device) for x in (k, v))
    query = None if q is None else q.to(device)
    step = cache.append(keys, values)
    asked = None if queries is None else queries[:, :, :tokens].to(device)
    cache.route(asked, step, choice=None if choice is None else choice.to(device))
    return cache, query


def _checked_labels(scheme: Scheme, choice: Tensor, k: Tensor) -> None:
    sizes = tuple(k.shape[:3])
    if not isinstance(choice, Tensor) or tuple(choice.shape) != sizes or choice.is_floating_point():
        what = f"{tuple(choice.shape)} of {choice.dtype}" if isinstance(choice, Tensor) else type(choice).__name__
        raise ShapeError(f"labels: {what}; give integers {sizes}, a tier for each kv head and token")
    most = max(1, len(scheme.tiers)) - 1
    if choice.numel() and not -1 <= int(choice.min()) <= int(choice.max()) <= most:
        raise ShapeError(f"labels: {int(choice.min())} to {int(choice.max())}; there are tiers 0 to {most}")
