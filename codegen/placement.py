"""Where a side's scale is applied, and the constants of its code: what the plan decides without any algebra."""

from __future__ import annotations

from enum import Enum

from kvdsl.scheme import ALL, Additive, Scale, Store, Uniform, Vectors
from kvdsl.window import token_block

from .layout import SideLayout


class When(Enum):
    """Where a side's scale and offset are applied."""

    NEVER = "there is no scale"
    AFTER_DOT = "once per token and channel group, behind the partial dot product"
    ONCE_PER_TILE = "once per tile of tokens that share it"
    ONCE_PER_QUERY = "once per query or output"
    IN_LOOP = "per element, in the loop"


def levels(code_: Uniform, scale: Scale) -> int:
    """Number of levels of a uniform code under a scale."""
    if code_.levels is not None:
        return code_.levels
    assert code_.bits is not None
    return 2**code_.bits - (scale.range == "absmax" and code_.grid == "ends")


def centre(code_: Uniform, scale: Scale) -> int:
    """The code that stands for zero (or lies next above it on grid `cells`) of a symmetric range."""
    count = levels(code_, scale)
    return count // 2 if scale.range == "signed_absmax" or code_.grid == "cells" else (count - 1) // 2


def within_groups(part: SideLayout, channels: int) -> bool:
    """Whether no plane crosses groups of so many channels."""
    return all(span.channels[0] // channels == span.channels[-1] // channels for span in part.spans)


def place(store: Store, part: SideLayout) -> When:
    """The outermost legal place of a store's scale, given how its planes lie.

    Behind the dot product a scale must be constant over the channels of whole planes; once per tile it must be constant
    over a tile's tokens, which takes blocks of 32 tokens or a multiple.  Rotary positions are put back on decoded
    numbers, radii and angles become channels when both are decoded, and vectors are looked up number by number.
    """
    scale = store.measure
    if store.polar or isinstance(store.code, (Additive, Vectors)):
        return When.IN_LOOP
    if scale is None:
        return When.NEVER
    if store.rope is not None:
        return When.IN_LOOP
    if scale.when == "calibrated":
        return When.ONCE_PER_QUERY
    if token_block(store) % 32 == 0:
        return When.ONCE_PER_TILE
    channels = scale.block.channels
    aligned = channels is ALL or within_groups(part, channels)  # type: ignore[arg-type]
    return When.AFTER_DOT if aligned else When.IN_LOOP
