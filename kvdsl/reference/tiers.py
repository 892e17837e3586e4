"""What a tier keeps of the tokens that were sent to it: whole blocks as its stores code them, the others as they came.

Where something is measured of all tokens of a tier, each channel's range or its size, it is measured on the tokens that
stand there; sizes `when="prompt"` on all tokens that are sent to tiers first, `when="arrived"` on all that there are
then behind the sinks.
"""

from __future__ import annotations

import dataclasses as dc
import math

import torch
from torch import Tensor

from kvdsl.errors import ShapeError
from kvdsl.scheme import ALL, SIDES, ChannelScale, Chosen, LowRank, Scheme, Side, Sparse, Store, Tier

from .feedback import directions, fed_forward
from .quantize import Params, quantize
from .rounding import LARGEST_INPUT, f32, ratio, stored

Rows = dict[Side, Tensor]


class TierRows:
    """The tokens of one tier: `tokens` int64 (B, H, n) in their places, and rows as they came, float64 (B, H, n, D)."""

    def __init__(self, scheme: Scheme, tier: Tier, number: int, params: Params | None) -> None:
        self.stores: dict[Side, Store] = {}
        self.scales: dict[Side, ChannelScale] = {}
        for side in SIDES:
            store = tier.store(side, scheme.keys if side == "keys" else scheme.values)
            first = store.transform[0] if store.transform else None  # type: ignore[index]
            if isinstance(first, ChannelScale) and first.when != "calibrated":
                self.scales[side] = first
                store = dc.replace(store, transform=store.transform[1:])  # type: ignore[index]
            self.stores[side] = store
        prefix = f"tiers[{number}]."
        given = {} if params is None else params
        self.params = {name.removeprefix(prefix): x for name, x in given.items() if name.startswith(prefix)}
        self.block = math.lcm(*(_together(term) for store in self.stores.values() for term in store.terms))
        self.sizes: dict[Side, Tensor] = {}
        self.directions: Tensor | None = None
        self.tokens: Tensor | None = None
        self.rows: Rows = {}

    @property
    def count(self) -> int:
        """Tokens of each head."""
        return 0 if self.tokens is None else self.tokens.shape[2]

    @property
    def measures(self) -> bool:
        """Whether something is measured of all its tokens, so that rows are kept in float32."""
        return bool(self.scales) or any(_spans(store) for store in self.stores.values()) or self.fed

    @property
    def fed(self) -> bool:
        """Whether errors of keys are fed forward."""
        return self.stores["keys"].feedback is not None

    def begin(self, query: Tensor | None, heads: int) -> None:
        """A sequence's first step has these queries (B, Hq, Q, D)."""
        part = self.stores["keys"].feedback
        if part is None:
            return
        if query is None:
            raise ShapeError("q: missing; errors of keys are fed forward by the queries of the first step")
        self.directions = directions(part, query, heads)

    def measure(self, rows: Rows, query: Tensor | None, when: str) -> None:
        """Measure tokens as they came, float64 (B, H, n, D), where a size of each channel is of those; query (B, Hq, Q,
        D) is the step's."""
        for side, scale in self.scales.items():
            if scale.when == when and rows[side].shape[2]:
                self.sizes[side] = _sizes(scale, rows[side], query)

    def put(self, tokens: Tensor, rows: Rows) -> None:
        """These are the tokens from now on, and their rows as they came."""
        self.measure(rows, None, "online")
        self.tokens, self.rows = tokens, rows

    def read(self, side: Side) -> Tensor:
        """What is read of a side, float64 (B, H, n, D)."""
        x, store = self.rows[side], self.stores[side]
        whole = self.count // self.block * self.block
        if not self.count:
            return x
        if side in self.sizes:
            size = self.sizes[side][:, :, None]
            y = ratio(x.clamp(-LARGEST_INPUT, LARGEST_INPUT), size)
            return f32(self._coded(store, y, whole, side) * size)
        if not _spans(store):
            return self._coded(store, x, whole, side)
        found = quantize(store, x, self.params, side)
        assert found.scale is not None and found.offset is not None
        y = ratio(f32(x.clamp(-LARGEST_INPUT, LARGEST_INPUT) - found.offset), found.scale)
        came = f32(f32(y * found.scale) + found.offset)
        return torch.cat([found.decoded[:, :, :whole], came[:, :, whole:]], 2)

    def _coded(self, store: Store, x: Tensor, whole: int, side: Side) -> Tensor:
        if not whole:
            return x
        assert self.tokens is not None
        at = self.tokens[:, :, :whole]
        if side == "keys" and store.feedback is not None:
            assert self.directions is not None
            fed = fed_forward(store, x[:, :, :whole], self.directions, self.params)
            store, x = dc.replace(store, feedback=None), torch.cat([fed, x[:, :, whole:]], 2)
        return torch.cat([quantize(store, x[:, :, :whole], self.params, side, at).decoded, x[:, :, whole:]], 2)


def _sizes(scale: ChannelScale, x: Tensor, query: Tensor | None) -> Tensor:
    """The size of each channel of tokens x (B, H, n, D), in fp16, 1 where it is 0: float64 (B, H, D)."""
    size = x.abs().clamp(max=LARGEST_INPUT).amax(2)
    if scale.by == "sqrt_absmax":
        size = f32(size.sqrt())
    elif scale.by == "balance":
        assert query is not None
        other = query.double().unflatten(1, (x.shape[1], -1)).abs().amax((2, 3))
        size = torch.where(other == 0, 1.0, f32(ratio(size, other).sqrt()))
    size = stored(size, "fp16")
    return torch.where(size == 0, 1.0, size)


def _spans(store: Store) -> bool:
    """Whether one scale of each channel is of all tokens, measured on them."""
    return store.scale is not None and store.scale.when == "online" and store.scale.block.tokens is ALL


def _together(term: Store) -> int:
    """Tokens that are coded together."""
    if isinstance(term.code, (LowRank, Sparse, Chosen)):
        return term.code.tokens
    tokens = 1
    if term.measure is not None and term.measure.when == "online" and isinstance(term.measure.block.tokens, int):
        tokens = term.measure.block.tokens
    return math.lcm(tokens, term.chosen.tokens if term.chosen is not None else 1)
