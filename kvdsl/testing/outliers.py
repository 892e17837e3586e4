"""Hypothesis strategies: outliers that stand beside a store's codes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

from hypothesis import strategies as st

from kvdsl.codes import SLOT_TOKENS, Fill
from kvdsl.scheme import ALL, Bands, Block, Float, Sketch, Sparse, Store, TopChannels, Uniform

Draw = Callable[..., Any]


@st.composite
def chosen(draw: Draw, keys: Store) -> TopChannels | None:
    """Outlier channels of every 32 or 64 tokens of keys, in one of the ways that stand beside their code; None where
    nothing can."""
    if keys.rope is not None or isinstance(keys.code, Bands) or isinstance(keys.code, Float) and keys.code.plain:
        return None
    per, store = draw(st.sampled_from([32, 64])), Store()
    if isinstance(keys.code, Sketch):
        other = st.builds(Sketch, st.sampled_from([8, 64, 136]), st.just("gaussian"), st.integers(0, 1))
        store = draw(st.sampled_from([store, Store(keys.code), Store(draw(other))]))
    elif _raisable(keys) and draw(st.booleans()):
        assert isinstance(keys.code, Uniform) and keys.code.bits is not None and keys.scale is not None
        assert isinstance(keys.scale.block.tokens, int)
        bits = keys.code.bits + draw(st.sampled_from([more for more in (1, 2, 4) if keys.code.bits + more <= 8]))
        store, per = keys.with_(bits=bits, residual=None), math.lcm(per, keys.scale.block.tokens)
    count = draw(st.sampled_from([1, 3, 8, 0.25]))
    return TopChannels(count, per=per, by=draw(st.sampled_from(["norm", "absmean", "absmax"])), store=store)


def _raisable(store: Store) -> bool:
    """Whether codes of more bits may stand beside the store's, under the same scale."""
    code, scale = store.code, store.scale
    whole = isinstance(code, Uniform) and code.levels is None and code.bits is not None and code.bits < 8
    if not whole or store.transform or scale is None or scale.when == "calibrated" or scale.scale is not None:
        return False
    return scale.block.channels == 1 and scale.range in ("minmax", "minmax_zero") and not scale.zero_inside


def sparse() -> st.SearchStrategy[Sparse]:
    """Single numbers of lines of one token or several, of which some are taken in heads of 32 channels, or beyond
    thresholds, one in three."""
    lines = st.sampled_from([Block(), Block(heads=ALL), Block(SLOT_TOKENS, 1), Block(16, 4)])
    shares, slots, fills = st.sampled_from([0.07, 0.15]), st.integers(1, 4), st.sampled_from(get_args(Fill))
    online = st.builds(Sparse, shares, lines, slots=slots, fill=fills)
    whole = st.builds(Sparse, shares, st.just(Block(ALL, 1)), slots=slots, fill=fills, when=st.just("calibrated"))
    return st.one_of(online, online, whole)
