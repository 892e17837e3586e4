"""Random codecs of queries, for keys whose packed tokens meet one vector each."""

from __future__ import annotations

from typing import Any, get_args

from hypothesis import strategies as st

from kvdsl.codes import FloatRounding
from kvdsl.scale import Exponent
from kvdsl.scheme import ALL, Count, Float, LowRank, Scale, Sketch, Store, Uniform, per_token


def queries(keys: Store) -> st.SearchStrategy[Store | None]:
    """As they are five times in six; else a small float of its own, or that or even levels under a scale."""
    sums = keys.outliers is not None or keys.residual is not None or keys.joined > 1 or keys.short
    if sums or keys.rope is not None or isinstance(keys.code, (LowRank, Sketch)):
        return st.none()
    ties = st.sampled_from(get_args(FloatRounding))
    plain = st.builds(Float, st.sampled_from(["e4m3", "e5m2"]), rounding=ties)
    small = st.builds(Float, st.sampled_from(["e4m3", "e5m2", "e2m1"]), rounding=ties)
    even = st.builds(Uniform, st.sampled_from([4, 8]), grid=st.sampled_from(["ends", "cells"]))
    scaled = st.builds(lambda code, scale: Store(code, scale=scale), st.one_of(small, even), scales())
    rounded = st.one_of(st.builds(Store, plain), scaled)
    return st.integers(0, 5).flatmap(lambda n: rounded if n == 5 else st.none())


def scales() -> st.SearchStrategy[Scale]:
    """Of a group of channels of one query, or of all of them."""
    channels, clip = st.sampled_from([8, 32, ALL]), st.sampled_from([1.0, 1.0, 0.9])
    stored = st.sampled_from(["fp32", "fp16", "bf16", "e4m3"]).map(lambda dtype: {"dtype": dtype})
    powers = st.sampled_from(get_args(Exponent)).map(lambda rule: {"dtype": "e8m0", "exponent": rule})

    def scale(channels: Count, clip: float, more: dict[str, Any]) -> Scale:
        return per_token(channels, range="absmax", clip=clip, **more)

    return st.builds(scale, channels, clip, st.one_of(stored, powers))
