"""The attention function registered with transformers: packed bytes where the cache is ours, else plain tensors."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .handle import Handle, step_of
from .latent import Absorbed
from .layer import Step, permuted
from .masks import padding_of
from .static import AWAITED

DENSE: Counter[str] = Counter()
"""`calls`: how often the function was given plain tensors (no cache, another's cache, encoders)."""

HARMLESS = frozenset(
    "position_ids cache_position use_cache output_hidden_states output_router_logits return_dict num_items_in_batch "
    "logits_to_keep labels seq_idx deterministic position_embeddings past_key_values input_ids inputs_embeds".split()
)
"""Keywords that reach an attention function without changing what it computes."""


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query (B, Hq, Q, D), key and value (B, H, K, D) or handles -> (out (B, Q, Hq, D), None).

    `s_aux` (Hq,) are attention sinks: one logit a head that joins the softmax.  Raises ValueError for what a packed
    cache cannot do: a keyword that changes the mathematics, dropout, attention in both directions.
    """
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if AWAITED.layer is not None:
        return _in_place(query, key, value, scaling, dropout, softcap, s_aux, kwargs), None
    step = step_of(key, value)
    if step is None:
        # One of the two may still be a handle, where a model computes with the other: then that one is decoded too.
        key, value = (x.step.touched(x.which) if isinstance(x, Handle) else x for x in (key, value))
        DENSE["calls"] += 1
        return _plain(
            module, query, key, value, attention_mask, scaling, dropout, sliding_window, softcap, s_aux, causal, kwargs
        )
    refuse(kwargs, dropout)
    if not causal:
        raise ValueError("attention: a packed cache is read causally, and this model attends in both directions")
    if step.layer.scheme.shared:
        return _over_records(module, step, query, attention_mask, scaling, sliding_window, softcap, s_aux), None
    return _over_cache(module, step, query, attention_mask, scaling, sliding_window, softcap, s_aux), None


def _over_records(
    module: Any,
    step: Step,
    query: Tensor,
    mask: Tensor | None,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """Of a model that caches latents, (B, Q, Hq, v): its up-projections are on the query and on the output."""
    record = Absorbed.of(module)
    plain = mask is None and step.began_empty and _fresh(step, query, sliding_window, softcap, s_aux)
    if plain:
        step.append(None, None, query.shape[1])
        step.layer.calls["fresh_calls"] += 1
        out: Tensor
        out, _ = sdpa_attention_forward(module, query, *record.fresh(step), None, scaling=scaling, is_causal=True)
        return out
    met = record.query(query)
    return record.out(_over_cache(module, step, met, mask, scaling, sliding_window, softcap, s_aux))


def _over_cache(
    module: Any,
    step: Step,
    query: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """Attention of query (B, Hq, Q, D) to a step and all before it: (B, Q, Hq, D)."""
    window = _window(step, sliding_window)
    padding = padding_of(attention_mask)
    if attention_mask is not None and (padding is None or not _fits(step, padding.counts, padding.real)):
        full = attention_mask if padding is None else padding.full()
        return _decoded(step, query, full, scaling, softcap, s_aux)
    calls = step.layer.calls
    counts, order = (None, None) if padding is None else (padding.counts, padding.order)
    step.append(counts, order, query.shape[1], softcap=softcap is not None)
    records = step.layer.scheme.shared  # of one head, for which the library knows no grouped attention
    if padding is None and step.began_empty and not records and _fresh(step, query, window, softcap, s_aux):
        calls["fresh_calls"] += 1
        out: Tensor
        out, _ = sdpa_attention_forward(module, query, step.keys, step.values, None, scaling=scaling, is_causal=True)
        step.routed(query, scaling, window=window)
        return out
    calls["packed_calls"] += 1
    assert step.layer.packed is not None
    state = step.layer.packed.tuned(step.state, scaling, softcap, window)
    query = query.contiguous() if order is None else permuted(query, order)
    out, lse = step.layer.packed.attend(query, state)
    step.routed(query, scaling, softcap, lse, window)
    if s_aux is not None:
        out = _with_sinks(out, lse, s_aux)
    if order is not None:
        out = permuted(out, order.argsort(dim=1))
    return out.transpose(1, 2).contiguous()


def _in_place(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    dropout: float,
    softcap: float | None,
    s_aux: Tensor | None,
    keywords: dict[str, Any],
) -> Tensor:
    """One token of every sequence over a static layer, whose keys and values are the fresh ones: (B, 1, Hq, D)."""
    layer, AWAITED.layer = AWAITED.layer, None
    assert layer is not None
    refuse(keywords, dropout)
    out, lse = layer.attended(query, key, value, scaling, softcap)
    if s_aux is not None:
        out = _with_sinks(out, lse, s_aux)
    return out.transpose(1, 2).contiguous()


def _with_sinks(out: Tensor, lse: Tensor, s_aux: Tensor) -> Tensor:
    """The output where one more logit a head joins the softmax."""
    return out * torch.sigmoid(lse - s_aux.float()[None, :, None])[..., None].to(out.dtype)


def refuse(keywords: dict[str, Any], dropout: float) -> None:
    """ValueError for a keyword that may change the mathematics, and for dropout."""
    for name, value in keywords.items():
        if value is None or value is False or name in HARMLESS:
            continue
        mend = (
            "leave it out"
            if name != "output_attentions"
            else "the kernels keep no weights; use attn_implementation='eager'"
        )
        raise ValueError(f"attention: {name} is not supported over a packed cache; {mend}")
    if dropout:
        raise ValueError(f"attention: dropout {dropout} over a packed cache; call model.eval()")


def _window(step: Step, asked: int | None) -> int | None:
    """The sliding window of a call.  A layer that kept all tokens serves any; one that let some go, its own or less."""
    own = step.layer.window
    if own is None or asked is None or asked <= own:
        return own if asked is None else asked
    raise ValueError(f"attention: a sliding window of {asked} over a cache that keeps {own} tokens")


def _fits(step: Step, counts: tuple[int, ...], real: tuple[int, ...]) -> bool:
    """Whether the tokens that a mask shows are those that the layer holds, plus the fresh ones it counts."""
    if step.state is not None:
        return True
    held = step.layer.packed.lengths if step.layer.packed is not None else (0,) * len(counts)
    return all(old + new == all_ for old, new, all_ in zip(held, counts, real, strict=True))


def _fresh(step: Step, query: Tensor, window: int | None, softcap: float | None, s_aux: Tensor | None) -> bool:
    """Whether a first prompt is plain causal attention over its own exact keys and values."""
    tokens = step.keys.shape[2]
    plain = softcap is None and s_aux is None and (window is None or tokens <= window)
    return plain and step.layer.scheme.prefill == "exact" and query.shape[2] == tokens


def _decoded(
    step: Step, query: Tensor, mask: Tensor, scaling: float, softcap: float | None, s_aux: Tensor | None
) -> Tensor:
    """Attention under a mask that only a full (B, 1, Q, K) tensor can say: over decoded keys and values."""
    if mask.dim() != 4:
        raise ValueError(
            f"attention: a mask of shape {tuple(mask.shape)}; give (batch, tokens) to the model, or (B, 1, Q, K)"
        )
    if step.began_empty:
        step.append(None, None, query.shape[1], softcap=softcap is not None)
    if step.began_empty and step.layer.scheme.prefill == "exact":
        step.layer.calls["fresh_calls"] += 1
        return by_hand(query, step.keys, step.values, mask, scaling, softcap, s_aux)
    step.layer.fell_back(
        "this mask is neither causal nor a sliding window, or hides stored tokens, so the cache is decoded for it"
    )
    numbers = step.numbers()
    return by_hand(query, numbers["keys"], numbers["values"], mask, scaling, softcap, s_aux)


def _plain(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    dropout: float,
    window: int | None,
    softcap: float | None,
    s_aux: Tensor | None,
    causal: bool,
    keywords: dict[str, Any],
) -> tuple[Tensor, None]:
    """Attention over plain tensors: the library's, or by hand where that lacks soft-capping and sinks."""
    padding = padding_of(mask)
    if padding is not None:
        mask = padding.full()
    elif mask is None and causal:
        mask = _lower_right(query.shape[2], key.shape[2], window, query.device)
    if softcap is None and s_aux is None:
        out: Tensor
        out, _ = sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=causal, **keywords
        )
        return out, None
    refuse(keywords, dropout)
    return by_hand(query, key, value, mask, scaling, softcap, s_aux, causal=causal), None


def _lower_right(queries: int, tokens: int, window: int | None, device: torch.device) -> Tensor | None:
    """The causal mask whose last query sees the last token; None where SDPA's own flag means the same."""
    if (queries == 1 or queries == tokens) and (window is None or tokens <= window):
        return None
    position = torch.arange(tokens - queries, tokens, device=device)[:, None]
    token = torch.arange(tokens, device=device)[None]
    seen = token <= position
    return (seen if window is None else seen & (token > position - window))[None, None]


def by_hand(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    s_aux: Tensor | None,
    *,
    causal: bool = False,
) -> Tensor:
    """Attention written out, in float32: query (B, Hq, Q, D), key and value (B, H, K, D) -> (B, Q, Hq, D).

    mask: bool (True: seen) or added, broadcast to (B, Hq, Q, K); `causal` adds the causal one.  A query that sees
    nothing gives zeros.
    """
    group = query.shape[1] // key.shape[1]
    scores = query.float() @ key.float().repeat_interleave(group, 1).transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        mask = mask[..., : key.shape[2]]
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.float()
    if causal and query.shape[2] > 1:
        seen = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril(key.shape[2] - query.shape[2])
        scores = scores.masked_fill(~seen, -torch.inf)
    if s_aux is not None:
        sinks = s_aux.float()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], 3)
    weights = torch.softmax(scores, 3).nan_to_num(0.0)[..., : key.shape[2]]
    out = weights @ value.float().repeat_interleave(group, 1)
    return out.transpose(1, 2).contiguous().to(query.dtype)
