"""What a law is asked about: a scheme at a shape, and numbers that a kind and a seed give."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from kvdsl import reference
from kvdsl.codegen import build
from kvdsl.kernels import Backend, KernelSet
from kvdsl.reference.quantize import encoded_rows, level_count
from kvdsl.scheme import SIDES, ChannelScale, ChannelShift, Permute, Scheme, Store, Uniform
from kvdsl.shape import Shape
from kvdsl.window import windows

from .data import numbers

METADATA = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


class LawBroken(AssertionError):
    """A law that does not hold; the message says of which case and where."""


@dataclass(frozen=True)
class Case:
    """One example: `tokens` tokens of `batch` sequences, numbers of kind `kind` from `seed`, which all choices of a law
    come from, too."""

    scheme: Scheme
    shape: Shape
    backend: Backend | None = None
    batch: int = 1
    tokens: int = 64
    kind: str = "normal"
    seed: int = 0

    def __str__(self) -> str:
        numbers = f"batch={self.batch}, tokens={self.tokens}, kind={self.kind!r}, seed={self.seed}"
        return f"Case({self.scheme!r}, {self.shape!r}, {self.backend!r}, {numbers})"

    @cached_property
    def kernels(self) -> KernelSet:
        return build(self.scheme, self.shape, self.backend)

    @cached_property
    def random(self) -> random.Random:
        return random.Random(self.seed)

    @property
    def sinks(self) -> int:
        return self.scheme.sinks.tokens if self.scheme.sinks else 0

    @property
    def block(self) -> int:
        """Tokens of a whole block of both sides."""
        return math.lcm(*(policy.block for policy in windows(self.scheme).values()))

    @property
    def whole(self) -> int:
        """`tokens` cut to whole blocks, one at least."""
        return max(1, self.tokens // self.block) * self.block

    @property
    def bare(self) -> Scheme:
        """The scheme without sinks: what happens to the tokens after them."""
        return self.scheme.with_(sinks=None) if self.scheme.sinks else self.scheme

    def pair(self, tokens: int, *, kind: str | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Keys and values (batch, heads, tokens, head_dim)."""
        size = (self.batch, self.shape.kv_heads, tokens, self.shape.head_dim)
        kind = kind or self.kind
        first, second = (numbers(kind, size, self.shape.dtype, 7919 * self.seed + 2 * seed + i) for i in range(2))
        return first, second

    def query(self, queries: int, seed: int = 0) -> Tensor:
        """Normal queries (batch, q_heads, queries, head_dim)."""
        assert self.shape.q_heads is not None
        size = (self.batch, self.shape.q_heads, queries, self.shape.head_dim)
        return numbers("normal", size, self.shape.dtype, 104729 * self.seed + seed)

    def params(self, k: Tensor, v: Tensor, share: float = 0.9) -> dict[str, Tensor]:
        """Calibrated parameters from k and v; ranges a little too narrow, so that some numbers saturate."""
        found: dict[str, Tensor] = {}
        for side, x in zip(SIDES, (k, v), strict=True):
            store = self.scheme.side(side)
            found |= _transforms(store, side, x, self.seed)
            if static(store):
                found[f"{side}.scale"] = calibrated(store, encoded_rows(store, x, found, side), share)
        return found

    def decoded(self, k: Tensor, v: Tensor, params: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What the reference decodes where every token is packed."""
        return reference.roundtrip(self.bare, k, v, window=False, params=params)


def _transforms(store: Store, side: str, x: Tensor, seed: int) -> dict[str, Tensor]:
    """Numbers of a store's calibrated transforms: from x, or drawn; none of them zero."""
    found: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(seed)
    clean = x.float().nan_to_num(0.0).clamp(-65504, 65504)
    for position, part in enumerate(store.transform):  # type: ignore[arg-type]
        if isinstance(part, ChannelScale):
            numbers = clean.abs().amax((0, 2)).clamp(min=2.0**-7).sqrt()
        elif isinstance(part, ChannelShift):
            numbers = clean.mean((0, 2))
        elif isinstance(part, Permute):
            numbers = torch.rand(x.shape[1], x.shape[3], generator=generator).argsort(-1).float()
        else:
            continue
        found[f"{side}.transform[{position}]"] = numbers
    return found


def static(store: Store) -> bool:
    """Whether the store's scale is calibrated."""
    return store.measure is not None and store.measure.when == "calibrated"


def calibrated(store: Store, x: Tensor, share: float) -> Tensor:
    """The parameter of a calibrated store: float32 numbers that its metadata format holds."""
    scale, code = store.measure, store.code
    assert scale is not None and isinstance(code, Uniform)
    batch, heads, tokens, dim = x.shape
    bh = heads if scale.block.heads != 1 else 1
    bc = scale.block.channels if isinstance(scale.block.channels, int) else dim
    blocks = x.float().reshape(batch, heads // bh, bh, tokens, dim // bc, bc)
    low, high = blocks.amin((0, 2, 3, 5)) * share, blocks.amax((0, 2, 3, 5)) * share
    levels = level_count(store)
    if scale.range == "minmax_zero":
        low, high = low.clamp(max=0), high.clamp(min=0)
    size = torch.maximum(-low, high)
    if scale.range == "absmax":
        step = 2 * size / levels if code.grid == "cells" else size / ((levels - 1) // 2)
    elif scale.range == "signed_absmax":
        step = size / (levels // 2)
    else:
        step = (high - low) / (levels if code.grid == "cells" else levels - 1)
    step = step.clamp(min=2.0**-14)
    found = step if scale.range in ("absmax", "signed_absmax") else torch.stack([step, low])
    return found.clamp(-65504, 65504).to(METADATA[scale.dtype]).float()


Test = Callable[[Case], None]


@dataclass(frozen=True)
class Law:
    """A statement about every case: `test` raises LawBroken; `applies` says of which schemes it is made; `kinds` which
    numbers it is asked about (none: all)."""

    name: str
    number: str
    test: Test
    applies: Callable[[Scheme], bool]
    kinds: tuple[str, ...] = field(default=())

    def __call__(self, case: Case) -> None:
        try:
            self.test(case)
        except LawBroken as broken:
            raise LawBroken(f"{self.name}: {broken}\nin {case}") from None
        except Exception as error:
            raise LawBroken(f"{self.name}: raised {type(error).__name__}: {error}\nin {case}") from error


LAWS: dict[str, Law] = {}


def law(
    number: str, applies: Callable[[Scheme], bool] = lambda _: True, kinds: tuple[str, ...] = ()
) -> Callable[[Test], Law]:
    """Enter a law into the table under its function's name and its number."""

    def enter(test: Test) -> Law:
        LAWS[test.__name__] = made = Law(test.__name__, number, test, applies, kinds)
        return made

    return enter


def require(holds: bool, fact: str) -> None:
    """LawBroken unless it holds."""
    if not holds:
        raise LawBroken(fact)


def require_equal(what: str, got: Tensor, want: Tensor) -> None:
    """Equal numbers, NaN where NaN is wanted; else LawBroken with the first place that differs."""
    require(got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, wanted {tuple(want.shape)}")
    got, want = got.cpu(), want.cpu()
    if got.is_floating_point():
        got, want = got.double(), want.double()
        different = (got != want) & ~(got.isnan() & want.isnan())
    else:
        different = got != want
    if different.any():
        at = tuple(different.nonzero()[0].tolist())
        count = int(different.sum())
        raise LawBroken(
            f"{what}{list(at)}: {got[at].item()!r}, wanted {want[at].item()!r}; {count} of {got.numel()} differ"
        )


def require_within(what: str, got: Tensor, want: Tensor, limit: Tensor | float) -> None:
    """|got - want| <= limit everywhere (and both finite); else LawBroken with the worst place."""
    error = (got.cpu().double() - want.cpu().double()).abs()
    excess = error - torch.as_tensor(limit, dtype=torch.float64)
    excess = torch.where(excess.isnan(), torch.full_like(excess, math.inf), excess)
    if error.numel() and bool((excess > 0).any()):
        at = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
        most = torch.as_tensor(limit, dtype=torch.float64).expand_as(error)[at].item()
        raise LawBroken(f"{what}{list(at)}: {got[at].item()!r}, wanted {want[at].item()!r} within {most:.3g}")
