"""Mixed precision by token: tiers, each a way to store the tokens that are sent there, and routers, which send them.

Sinks and the newest tokens stay exact; every other token of a kv head goes to one tier.  Attention does not care about
the order of tokens, so a tier is a cache of its own, and what the tiers say is merged by log-sum-exp.
"""

from __future__ import annotations

import dataclasses as dc
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, Literal

from .part import Part
from .store import Store

if TYPE_CHECKING:
    from torch import Tensor

Metric = Literal["normalized", "accumulated", "mean", "last", "mean_std"]
Every = int | Literal["prompt"]
Moves = Literal["new", "down", "any"]
Requantize = Literal["never", "on_flush"]
Statistic = Literal["absmax", "norm"]

ROUTERS: dict[str, type[Router]] = {}
"""Every router by its name: those of the language, and a user's once its class is defined."""


@dataclass(frozen=True, repr=False)
class Tier(Part):
    """The tokens that are sent here are stored by the scheme's stores with `bits` a code, 16: in fp16, 0: not at all;
    or by stores of the tier's own.

    top   how many tokens: a count, or a share of all that were ever routed; None: the rest
    """

    bits: int | None = None
    _: KW_ONLY
    top: int | float | None = None
    keys: Store | None = None
    values: Store | None = None

    @property
    def drops(self) -> bool:
        """Whether tokens sent here are forgotten."""
        return self.bits == 0

    def quota(self, tokens: int) -> int | None:
        """How many of `tokens` routed tokens of a head stand here; None: the rest."""
        if self.top is None:
            return None
        return min(self.top, tokens) if isinstance(self.top, int) else int(self.top * tokens)

    def own(self, side: str) -> Store | None:
        """The tier's own store of one side."""
        return self.keys if side == "keys" else self.values

    def store(self, side: str, outer: Store) -> Store:
        """What stores one side of the tokens sent here, where the scheme's own store is `outer`."""
        own = self.own(side)
        if own is not None:
            return own
        if self.bits == 16:
            return Store()
        if self.bits is None or not any(field.name == "bits" for field in dc.fields(outer.code)):
            return outer
        return outer.with_(code=outer.code.with_(bits=self.bits))


DROP = Tier(0)
"""Tokens sent here are forgotten."""


@dataclass(frozen=True, repr=False)
class Probes(Part):
    """The queries whose attention is asked for: the newest ones of those at hand, and some drawn from the others.

    recent, random   how many, or a share of the queries at hand
    seed             of the draw, which is the same for all sequences, heads and layers
    """

    recent: int | float = 0
    random: int | float = 0
    _: KW_ONLY
    seed: int = 0


class Router(Part):
    """Which tier a token goes to.  A user's own router is a frozen dataclass that derives from this class and answers
    one of two questions:

    labels       the tier of each token, from its position alone
    importance   how much each token matters: the most important ones go to the first tier, until it is full, and so on

    every    how many tokens are decided on together; `prompt`: those of the first append alone, later ones stay exact
    moves    what a decision may do: send `new` tokens to tiers; by saliency also take the least important ones `down`,
             to the next tier; or `any` token from where it is to where it belongs now
    """

    every: Every = 1
    moves: Moves = "new"

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        ROUTERS[cls.__name__] = cls

    def labels(self, position: Tensor, prompt: int) -> Tensor | None:
        """The tier of each token, int64 (n,), by its position (n,) behind the sinks, both on the CPU; `prompt` is the
        number of tokens behind the sinks at the first decision.  None: ask for their importance."""
        return None

    def importance(self, keys: Tensor, values: Tensor) -> Tensor:
        """How much each of m new tokens matters, float32 (B, H, m), from keys and values (B, H, m, D)."""
        raise NotImplementedError(f"{type(self).__name__} says neither labels nor importance")


@dataclass(frozen=True, repr=False)
class Origin(Router):
    """The prompt goes to the first tier, generated tokens to the second."""

    def labels(self, position: Tensor, prompt: int) -> Tensor:
        """Tier 0 up to the prompt's end."""
        return (position >= prompt).long()


@dataclass(frozen=True, repr=False)
class Largest(Router):
    """Tokens whose keys, or values, are largest come first: attention sinks anywhere in the text have keys far from all
    others (KVSink, arXiv 2508.04257, predicts them from activations).

    by   the largest size of a channel (`absmax`) or the root of the sum of squares (`norm`); `smallest` turns it round
    """

    of: Literal["keys", "values"] = "keys"
    by: Statistic = "absmax"
    _: KW_ONLY
    smallest: bool = False
    every: Every = 64

    def importance(self, keys: Tensor, values: Tensor) -> Tensor:
        """The statistic of each token."""
        x = (keys if self.of == "keys" else values).double()
        size = (x.abs().amax(-1) if self.by == "absmax" else x.square().sum(-1).sqrt()).float()
        return -size if self.smallest else size


@dataclass(frozen=True, repr=False)
class Saliency(Router):
    """Tokens that receive most attention come first.  A is the causal softmax matrix of a head, summed over the query
    heads of a kv head.

    metric   `accumulated`: the column's sum (H2O, arXiv 2306.14048); `normalized`: the same over the number of queries
             that can see the token (ZipCache, arXiv 2405.14256, equation 8), `mean`: the same with every query so far;
             `last`: the newest query's row; `mean_std`: the mean, but tokens whose weights vary most come first (RoCo,
             arXiv 2402.06262): all but as many as are a `scope` share of those that the first tier and the window hold
    probes   the queries whose rows are computed, of those since the last decision; None: all of them, so that sums are
             carried on from step to step
    every    how many tokens are decided on together, or `prompt`, see Router
    moves    see Router
    pool     a token's importance is the largest of so many neighbours' (SnapKV, arXiv 2404.14469)
    per      whether tokens are chosen for each kv head, or once for a layer, by the sum over its heads
    later    the metric of decisions behind the prompt, where it is another
    scope    see mean_std
    """

    metric: Metric = "normalized"
    _: KW_ONLY
    probes: Probes | None = None
    every: Every = 1
    moves: Moves = "new"
    pool: int = 1
    per: Literal["kv_head", "layer"] = "kv_head"
    later: Metric | None = None
    scope: float = 0.7

    @property
    def carried(self) -> int:
        """Sums of each kept token that are carried on from step to step: of its weights, and of their squares."""
        metrics = (self.metric, self.later)
        if self.probes is not None or self.every == "prompt" or "last" in metrics:
            return 0
        return 2 if "mean_std" in metrics else 1
