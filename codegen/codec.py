"""The quantizer as functions of a side: which there are, what they take, how they are called.

What a generated module may hold for a side, each only where the side needs it:

    measure_<side>(statistics, ...)      the stored numbers of blocks, as float32
    encode_<side>(x, numbers, ...)       codes
    levels_<side>(c, ...)                what codes stand for, float32
    products_<side>(x, numbers, ...)     what a second scale is fitted from, float64, to be summed over the block
    refit_<side>(scale, sums, ...)       the second scale, as stored
    loss_<side>(x, numbers, ...)         squared errors, float64, to be summed over the block
    words_<side>(numbers, spoilt)        the stored numbers' bits

`codec_scales` and `codec_codes` print their bodies, `codec_text` the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from .placement import within_groups
from .plan import SidePlan

Namespace = Literal["tl.", "torch."]
Body = Callable[[SidePlan, Namespace], list[str]]

# dtype -> what reads a word of it, and the low and the high half of a word twice as wide
READ = {
    "fp16": ("half", "low_half", "high_half"),
    "bf16": ("half_bf16", "low_half_bf16", "high_half_bf16"),
    "fp32": ("as_float", "", ""),
    "e4m3": ("e4m3", "e4m3", "high_e4m3"),
    "e8m0": ("e8m0", "", ""),
}


def statistics(side: SidePlan) -> list[str]:
    """What is measured of a block's numbers: low, high or top (extremes), squares, sizes (sums)."""
    if side.scale.dtype == "e8m0" or side.scale.range == "absmax":
        return ["top"]
    return {"norm": ["squares"], "absmean": ["sizes"]}.get(side.scale.range or "", ["low", "high"])


def counted_numbers(side: SidePlan) -> int:
    """Numbers of a block; of a sketch those of the vector, before it is mapped."""
    if side.sketched:
        return side.channels
    meta = side.layout.meta
    assert meta is not None
    return meta.tokens * meta.channels * meta.heads


def settled(side: SidePlan) -> bool:
    """Whether a pack kernel has a block's numbers in registers when it measures their extremes, and makes them finite
    there, where that is needed at all: whatever is done with them later takes them as they are."""
    meta = side.layout.meta
    if side.static or side.store.measure is None or side.sketched or meta is None or meta.heads > 1:
        return False
    return statistics(side)[-1] in ("high", "top") and (meta.channels == 1 or within_groups(side.layout, meta.channels))


def clips(side: SidePlan) -> tuple[float, ...]:
    """The candidates of a search; one where there is none."""
    clip = side.scale.clip
    return clip if isinstance(clip, tuple) else (clip,)


def searched(side: SidePlan) -> bool:
    """Several scales are tried."""
    return len(clips(side)) > 1


def numbers(side: SidePlan) -> list[str]:
    """What is measured of a block before anything is coded."""
    return ["scale", "start"] if side.has_offset else ["scale"]


def stored_numbers(side: SidePlan) -> list[str]:
    """What is stored of a block: the second scale in place of the first, where there is one."""
    return ["fitted"] if side.scale.refit else numbers(side)


def coding(side: SidePlan) -> list[str]:
    """The numbers that codes are taken with."""
    return [] if side.sketched else [*numbers(side), *counted(side)]


def counted(side: SidePlan) -> list[str]:
    """How many levels a block has, where outlier channels have more than others."""
    return ["count"] if side.raised else []


def tried(side: SidePlan) -> list[str]:
    """The numbers that a candidate of a search brings."""
    return [*numbers(side), *(["fitted"] if side.scale.refit else [])]


def sums(side: SidePlan) -> list[str]:
    """What a second scale is fitted from, each summed over the block."""
    every = {"norm": ["squared", "weights"], "unit_gain": ["squared", "dots"]}
    return every.get(side.scale.refit or "", ["dots", "weights"])


def words(side: SidePlan) -> list[str]:
    """What `words_<side>` returns: a word, or two."""
    meta = side.layout.meta
    assert meta is not None
    return ["word", *(["second"] if meta.kind == "words" else [])]


def given(side: SidePlan, function: str) -> list[str]:
    """What comes with the parameters and a function of the side takes last: a table's levels, the second level.  Of
    levels that codes are decoded at, where they are others, `levels` takes these alone and `loss` both."""
    kinds = {"levels": ["decoded"], "loss": ["level", "decoded"]} if side.alphabet.matched else {}
    every = kinds.get(function, ["level"]) if side.alphabet.given else []
    table = [f"{kind}{i}" for kind in every for i in range(side.alphabet.count)]
    return [*table, *(["outer"] if side.second is not None else [])]


def call(side: SidePlan, name: str, takes: Sequence[str]) -> str:
    """A call of one of the side's functions."""
    extra = [given_name(side, one) for one in given(side, name)] if name != "words" else []
    return f"{name}_{side.label}({', '.join([*takes, *extra])})"


def given_name(side: SidePlan, name: str) -> str:
    """What a kernel calls a number of the parameters."""
    return f"{side.letter}_{name}"


def in_steps(side: SidePlan, number: str, ns: Namespace) -> str:
    """A number over the stored scale, exactly rounded, and 0 where the scale is 0.

    A scale that was not measured of the numbers themselves may be far smaller than they are.
    """
    free = side.static or side.second is not None
    if side.scale.dtype in ("fp16", "e4m3") and not free:
        return f"in_half_steps({number}, scale)"
    return f"in_steps({number}, scale{f', {fine(side) or free}, {free}' if ns == 'tl.' else ''})"


def made(side: SidePlan) -> bool:
    """Whether the rows that a term is of are float32, as they come from the host or another kernel: not the vectors,
    but what is left of them, without single numbers, the channels of another store, or their positions."""
    return bool(side.depth and not side.stretch or side.parted or side.sparse or side.rope)


def fine(side: SidePlan) -> bool:
    """Whether codes are made of numbers that may be smaller than float16 has any."""
    return side.fine or side.turned or made(side)
