"""Random schemes with tiers, or with all quantized anew at every flush: legal by construction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from kvdsl.scheme import (
    ALL,
    DROP,
    ChannelScale,
    Codebook,
    Feedback,
    Float,
    Largest,
    Origin,
    PreRope,
    Probes,
    Recent,
    Rotate,
    Router,
    Saliency,
    Scheme,
    Sinks,
    Store,
    Tier,
    Uniform,
    per_channel,
    per_token,
)

Draw = Callable[..., Any]

ALONE: tuple[Store, ...] = (
    Store(Uniform(4), scale=per_token()),
    Store(Uniform(2), scale=per_token(channels=32, dtype="bf16")),
    Store(Uniform(8), scale=per_token(range="absmax", dtype="fp32")),
    Store(Uniform(3), scale=per_token(), transform=Rotate("hadamard", 32)),
    Store(Codebook(4, "normal"), scale=per_token(range="norm")),
    Store(Uniform(2), scale=per_token(), residual=Store(Uniform(1), scale=per_token())),
    Store(Float("e4m3"), scale=per_token(range="absmax")),
    Store(),
)
"""Stores of tokens that have nothing in common."""
GIVEN: tuple[Store, ...] = (
    Store(Uniform(4), scale=per_channel(tokens=ALL).with_(when="calibrated")),
    Store(Uniform(4), scale=per_token(), transform=ChannelScale()),
)
"""Stores with calibrated numbers."""
TOGETHER: tuple[Store, ...] = (
    Store(Uniform(2), scale=per_channel(tokens=32)),
    Store(Uniform(4), scale=per_channel(tokens=8)),
    Store(Uniform(4), scale=per_token(heads=ALL)),
)
"""Stores of a few tokens, or of tokens of all heads that come at a time."""
MEASURED: tuple[Store, ...] = (
    Store(Uniform(4), scale=per_token(heads=ALL), transform=ChannelScale(when="prompt")),
    Store(Uniform(3), scale=per_token(channels=32, range="absmax"), transform=ChannelScale(when="arrived")),
    Store(Uniform(3), scale=per_token(), transform=ChannelScale("absmax", when="prompt")),
)
"""Stores that measure the prompt."""
BALANCED = Store(Uniform(2), scale=per_token(channels=32), transform=ChannelScale("balance", when="prompt"))
"""One of keys that measures the prompt's queries, too."""
FED: tuple[Store, ...] = (
    Store(Uniform(2), scale=per_channel(tokens=8), feedback=Feedback(2, weight=0.1, channels=16)),
    Store(Codebook(3, "normal"), scale=per_token(channels=8), feedback=Feedback(weight=0.01, channels=24)),
)
"""Stores of keys whose errors are fed forward, under scales of several tokens and of one."""
ANEW: tuple[Store, ...] = (
    Store(Uniform(4), scale=per_channel(tokens=ALL)),
    Store(Uniform(2), scale=per_channel(tokens=ALL, dtype="fp32").with_(clip=0.9)),
    Store(Uniform(4, grid="cells"), scale=per_channel(tokens=ALL)),
    Store(Uniform(4), scale=per_token(heads=ALL), transform=ChannelScale(when="online")),
)
"""Stores that measure all tokens of a tier, which are quantized anew whenever some come."""


def routed_schemes(*, longest: int = 64, attention: bool = True) -> st.SearchStrategy[Scheme]:
    """Legal schemes without layers whose cache is one of tiers.  `longest`: the most tokens that wait in a window;
    attention   also such that send tokens to tiers by the attention that they receive"""
    return _routed(longest, attention)


@st.composite
def _routed(draw: Draw, longest: int, attention: bool) -> Scheme:
    sinks = draw(st.sampled_from([None, None, Sinks(1), Sinks(4)]))
    anew = draw(st.sampled_from(["never", "never", "on_flush"]))
    rolling = st.builds(Recent, st.integers(1, longest))
    if draw(st.integers(0, 9)) == 9:
        full = Recent(8 * draw(st.integers(1, max(1, longest // 8))), "whole")
        return Scheme(
            draw(st.sampled_from(FED)), draw(st.sampled_from(ALONE)), sinks=sinks, recent=full, tiers=(Tier(),)
        )
    if draw(st.integers(0, 4)) == 4:  # no tiers, or one
        keys, values = draw(_keys(anew, "new")), draw(_stores(anew, "new"))
        tiers = draw(st.sampled_from([(), (Tier(),)])) if anew == "on_flush" else (Tier(),)
        whole = st.builds(Recent, st.integers(1, longest), st.just("whole"))
        recent = draw(st.one_of(st.none(), rolling, whole))
        return Scheme(keys, values, sinks=sinks, recent=recent, tiers=tiers, requantize=anew)
    router = draw(_routers(attention, anew, longest))
    keys, values = draw(_keys(anew, router.moves)), draw(_stores(anew, router.moves))
    keys = draw(st.sampled_from([keys] * 7 + [BALANCED]))
    tiers = draw(_tiers(keys, values, anew, router))
    recent = draw(st.one_of(st.none(), rolling, rolling))
    return Scheme(keys, values, sinks=sinks, recent=recent, tiers=tiers, router=router, requantize=anew)


@st.composite
def _stores(draw: Draw, anew: str, moves: str) -> Store:
    """A store that suits what is done to its tokens."""
    if moves == "down" and anew == "never":
        return draw(st.sampled_from([*ALONE, MEASURED[1]]))
    more = (*ANEW, *ANEW) if anew == "on_flush" else ()
    return draw(st.sampled_from([*ALONE, *ALONE, *GIVEN, *TOGETHER, *MEASURED, *more]))


@st.composite
def _keys(draw: Draw, anew: str, moves: str) -> Store:
    """The same of keys: of four, one is stored before its rotary positions where it can be."""
    store: Store = draw(_stores(anew, moves))
    spans = store.scale is not None and store.scale.when == "online" and store.scale.block.tokens is ALL
    if store.residual is not None or spans or draw(st.integers(0, 3)) != 3:
        return store
    parts = list(store.transform)  # type: ignore[arg-type]
    measured = [part for part in parts if isinstance(part, ChannelScale) and part.when != "calibrated"]
    rest = [part for part in parts if part not in measured]
    return store.with_(transform=(*measured, PreRope(draw(st.booleans())), *rest))


@st.composite
def _routers(draw: Draw, attention: bool, anew: str, longest: int) -> Router:
    every = draw(st.sampled_from([1, 1, 3, 20, longest, "prompt"]))
    kind = draw(st.sampled_from(["origin", "largest", *["saliency"] * (3 if attention else 0)]))
    if kind == "origin":
        return Origin()
    if kind == "largest":
        of, by = draw(st.sampled_from(["keys", "values"])), draw(st.sampled_from(["absmax", "norm"]))
        return Largest(of, by, smallest=draw(st.booleans()), every=every)
    metric = draw(st.sampled_from(["normalized", "accumulated", "mean", "last", "mean_std"]))
    probes = None if metric == "last" else draw(st.one_of(st.none(), st.builds(
        Probes, st.sampled_from([0, 1, 5, 0.05, 0.5]), st.sampled_from([0, 2, 0.05, 0.9]), seed=st.integers(0, 3),
    )))  # fmt: skip
    moves = draw(st.sampled_from(["new", "new", "down", *(["any"] if anew == "on_flush" else [])]))
    later = draw(st.sampled_from([None, None, "last", "mean"])) if probes is not None else None
    return Saliency(
        metric, probes=probes, every=every, moves=moves, pool=draw(st.sampled_from([1, 1, 5])),
        per=draw(st.sampled_from(["kv_head", "kv_head", "layer"])), later=later,
    )  # fmt: skip


@st.composite
def _tiers(draw: Draw, keys: Store, values: Store, anew: str, router: Router) -> tuple[Tier, ...]:
    """Two to four tiers: of as many bits as codes may have, in fp16, with stores of their own, or what drops."""
    count = draw(st.sampled_from([2, 2, 3, 4]))
    fits = [bits for bits in (None, 16, 8, 4, 2) if _fits(keys, bits) and _fits(values, bits)]
    found = []
    for place in range(count):
        tier = Tier(draw(st.sampled_from(fits)))
        if draw(st.integers(0, 3)) == 3:
            tier = Tier(keys=draw(_keys(anew, router.moves)), values=draw(_stores(anew, router.moves)))
        if place == count - 1 and draw(st.integers(0, 2)) == 2:
            tier = DROP
        elif place < count - 1 and not isinstance(router, Origin):
            tier = replace(tier, top=draw(st.sampled_from([1, 7, 24, 0.1, 0.3])))
        found.append(tier)
    return tuple(found)


def _fits(store: Store, bits: int | None) -> bool:
    """Whether the code may have so many bits."""
    return bits in (None, 16) or not isinstance(store.code, Codebook) or bits == 4
