"""How many tokens stand in each tier, and how many are exact: integers, before any cache is made."""

from __future__ import annotations

from .scheme import Scheme

TYPICAL = 4096  # tokens by which a router that goes by positions is judged


def targets(scheme: Scheme, routed: int) -> tuple[int, ...]:
    """How many of `routed` tokens of a kv head stand in each tier, by its quotas; the last one has the rest."""
    found, left = list[int](), routed
    for tier in scheme.tiers or (None,):
        quota = None if tier is None else tier.quota(routed)
        found.append(left if quota is None else min(quota, left))
        left -= found[-1]
    return tuple(found)


def exact(scheme: Scheme, tokens: int) -> int:
    """How many of a prompt of `tokens` tokens are sinks, or wait among the newest."""
    sinks = min(tokens, scheme.sinks.tokens if scheme.sinks else 0)
    behind = tokens - sinks
    if scheme.recent is None:
        return sinks
    whole = scheme.recent.flush == "whole"
    return sinks + (behind % scheme.recent.tokens if whole else min(behind, scheme.recent.tokens))


def shares(scheme: Scheme, tokens: int | None) -> tuple[tuple[float, ...], float]:
    """The share of all tokens in each tier, and of exact ones: of a prompt of `tokens`, or without end."""
    from .tier_rules import decides_by_position

    held = 0 if tokens is None else exact(scheme, tokens)
    routed = (TYPICAL if tokens is None else tokens) - held
    if scheme.router is not None and decides_by_position(scheme.router):
        counts = labelled(scheme, 0, routed, 0 if tokens is None else routed)
    elif tokens is None:
        parts = [tier.top if isinstance(tier.top, float) else 0.0 for tier in scheme.tiers[:-1]]
        return (*parts, 1.0 - sum(parts)), 0.0
    else:
        counts = targets(scheme, routed)
    whole = TYPICAL if tokens is None else tokens
    return tuple(count / whole for count in counts), held / whole


def labelled(scheme: Scheme, begin: int, end: int, prompt: int) -> tuple[int, ...]:
    """How many of the tokens [begin, end) behind the sinks a router that goes by positions sends to each tier."""
    from .routing import labels_of

    labels = labels_of(scheme, begin, end, prompt)
    return tuple(int((labels == tier).sum()) for tier in range(len(scheme.tiers)))
