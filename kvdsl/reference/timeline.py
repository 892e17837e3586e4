"""Which tokens are packed when, told as the story of one token after the other.

The first `sinks` tokens stay exact for ever.  Every later one waits among the newest; `recent` says how many wait.
"""

from __future__ import annotations

from torch import Tensor

from kvdsl.scheme import SIDES, LowRank, Scheme, Sparse, Store

from .quantize import Params, quantize, widened

Packed = dict[str, tuple[int, int]]


def packed_tokens(scheme: Scheme, side: str, tokens: int) -> tuple[int, int]:
    """(first, end): tokens [first, end) are packed once `tokens` have arrived and all that must leave have left."""
    store = scheme.keys if side == "keys" or scheme.shared else scheme.values
    sinks = scheme.sinks.tokens if scheme.sinks is not None else 0
    room = scheme.recent.tokens if scheme.recent is not None else 0
    together = scheme.recent is not None and _leave_together(scheme.recent.flush, store)
    packed = waiting = 0
    for _ in range(tokens - sinks):
        waiting += 1
        if together and waiting == room:
            packed, waiting = packed + waiting, 0
        if not together and waiting > room:
            packed, waiting = packed + 1, waiting - 1
    first = min(sinks, tokens)
    return first, first + packed


def _leave_together(flush: str, store: Store) -> bool:
    if flush != "auto":
        return flush == "whole"
    if any(isinstance(one.code, (LowRank, Sparse)) or one.chosen or one.balance for one in store.terms):
        return True
    online = (one.measure for one in store.terms if one.measure is not None and one.measure.when == "online")
    return any(scale.block.tokens != 1 for scale in online)


def contents(store: Store, x: Tensor, packed: tuple[int, int], params: Params | None, side: str) -> Tensor:
    """What the cache holds of `x` (B, H, T, D) as float64: tokens [first, end) decoded from codes, the rest exact."""
    first, end = packed
    held = widened(x, side).clone()
    if end > first:
        held[:, :, first:end] = quantize(store, x[:, :, first:end], params, side, first).decoded
    return held


def whole_sequence(scheme: Scheme, tokens: int, *, window: bool) -> Packed:
    """The packed tokens of both sides after `tokens` tokens; all of them where window and sinks are left out."""
    return {side: packed_tokens(scheme, side, tokens) if window else (0, tokens) for side in SIDES}
