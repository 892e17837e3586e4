"""Which tokens of a sequence are packed, which stay exact: the scheme's window and sinks over time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .scheme import SIDES, Chosen, LowRank, Scheme, Sparse, Store, Uniform

if TYPE_CHECKING:
    from torch import Tensor

TILE = 64
WIDE = 128
FEW_BITS = 6


@dataclass(frozen=True)
class Window:
    """The policy of one side.  Positions u count from the first token after the sinks.

    `block` is the number of tokens that share a scale; `whole` says that the window leaves all at once when it is full.
    """

    sinks: int
    recent: int
    whole: bool
    block: int

    def packed(self, tokens: int) -> int:
        """How many tokens after the sinks are packed once `tokens` have arrived and the window was flushed."""
        routed = max(0, tokens - self.sinks)
        return routed // self.recent * self.recent if self.whole else max(0, routed - self.recent)

    def packed_there(self, tokens: Tensor) -> Tensor:
        """The same of a tensor of counts, where it stands."""
        routed = (tokens - self.sinks).clamp(min=0)
        return routed // self.recent * self.recent if self.whole else (routed - self.recent).clamp(min=0)

    @property
    def step(self) -> int:
        """Tokens that one more token packs at most."""
        return self.recent if self.whole else 1

    @property
    def ring(self) -> int:
        """Exact rows a sequence needs at most between two flushes, beside its sinks (at least one)."""
        return max(1, self.recent)


def windows(scheme: Scheme) -> dict[str, Window]:
    """The policy of each side, by its name."""
    sinks = scheme.sinks.tokens if scheme.sinks else 0
    recent = scheme.recent.tokens if scheme.recent else 0
    flush = scheme.recent.flush if scheme.recent else "rolling"
    policies: dict[str, Window] = {}
    for side in SIDES:
        store = scheme.keys if scheme.shared else scheme.side(side)  # a record is packed once, whole
        block = math.lcm(*map(waiting, store.terms))
        policies[side] = Window(sinks, recent, flush == "whole" or (flush == "auto" and block > 1), block)
    return policies


def waiting(store: Store) -> int:
    """Tokens that are packed together: those of a token block, of a tile, and those that outlier channels are chosen
    for."""
    others = [part.tokens for part in (store.chosen, store.balance) if part is not None]
    return math.lcm(token_block(store), *others)


def token_block(store: Store) -> int:
    """Tokens that share an online scale, vectors of low rank, slots for single numbers, or chosen channels alone."""
    if isinstance(store.code, (LowRank, Sparse, Chosen)):
        return store.code.tokens
    scale = store.measure
    tokens = scale.block.tokens if scale is not None and scale.when == "online" else 1
    return tokens if isinstance(tokens, int) else 1


def tile_tokens(scheme: Scheme) -> int:
    """Tokens of which a page holds a whole number: as many as a program reads at a time.

    What it does once for all of them, as to find their maxima and to scale sums by how much those grew, is shared by
    WIDE tokens where a key's and a value's number together take FEW_BITS bits at most, as codes of even levels.
    """
    stores = [scheme.side(side) for side in SIDES]
    codes = [store.code for store in stores if len(store.terms) == 1 and store.rope is None]
    bits = [code.bits for code in codes if isinstance(code, Uniform) and code.bits is not None]
    return WIDE if len(bits) == len(SIDES) and sum(bits) <= FEW_BITS else TILE
