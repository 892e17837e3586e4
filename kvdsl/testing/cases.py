"""What a law is asked about: a scheme at a shape, and numbers that a kind and a seed give."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from kvdsl.calibration import second_level
from kvdsl.codegen import build
from kvdsl.fitting import thresholds, without
from kvdsl.interpreting import interpreted
from kvdsl.kernels import Backend, KernelSet
from kvdsl.matrices import rotation
from kvdsl.reference.quantize import encoded_rows, quantize
from kvdsl.reference.spaces import without_rope
from kvdsl.scheme import (
    SIDES,
    Additive,
    ChannelScale,
    ChannelShift,
    Codebook,
    Eigenbasis,
    Permute,
    PreRope,
    Scheme,
    Sparse,
    Store,
    TopChannels,
    Vectors,
)
from kvdsl.shape import Shape
from kvdsl.transforms import Pick
from kvdsl.window import windows

from .data import numbers

METADATA = {
    "fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}  # fmt: skip


class LawBroken(AssertionError):
    """A law that does not hold; the message says of which case and where."""


PARTS = 5  # ways in which rotary positions turn channels


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
    def rotated(self) -> int:
        """Channels that the model's rotary positions turn: all or a part.  Kernels are compiled for a number of them,
        so that compiled ones, which take minutes, are asked for one a shape."""
        dim = self.shape.head_dim
        parts = (dim, dim, dim // 2, dim // 4, dim - 2)
        compiled = self.backend == "triton" and not interpreted()
        return parts[dim // 16 % PARTS if compiled else random.Random(self.seed).choice(range(PARTS))]

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
        """Keys and values (batch, heads, tokens, head_dim); shared values are the first channels of the keys."""
        size = (self.batch, self.shape.kv_heads, tokens, self.shape.head_dim)
        kind = kind or self.kind
        first, second = (numbers(kind, size, self.shape.dtype, 7919 * self.seed + 2 * seed + i) for i in range(2))
        dim = self.scheme.dim("values", self.shape.head_dim)
        return first, first[..., :dim].contiguous() if self.scheme.shared else second

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
            found |= _transforms(store, side, x, self.seed, self.rotated)
            store = store.own
            y = encoded_rows(store, x, found, side) if store.turned else x
            found |= calibrated(store.with_(transform=()), y, share, side)
        return found

    def decoded(self, k: Tensor, v: Tensor, params: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What the reference decodes where every token is packed, the first one behind the sinks."""
        keys, values = (
            quantize(self.scheme.side(side), x, params, side, self.sinks).decoded
            for side, x in zip(SIDES, (k, v), strict=True)
        )
        return keys, values


def _transforms(store: Store, side: str, x: Tensor, seed: int, rotated: int) -> dict[str, Tensor]:
    """Numbers of a store's calibrated transforms: from x, or drawn; none of them zero."""
    found: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(seed)
    clean = x.float().nan_to_num(0.0).clamp(-65504, 65504)
    if isinstance(store.outliers, TopChannels) and not store.outliers.online:
        heads, channels = x.shape[1], x.shape[3]
        count = Pick(store.outliers.n, True).width(channels)
        top = torch.rand(heads, channels, generator=generator).argsort(-1)[:, :count]
        found[f"{side}.outliers"], clean = top.float(), without(top, clean)
    for position, part in enumerate(store.transform):  # type: ignore[arg-type]
        if isinstance(part, PreRope):
            numbers = frequencies(rotated, seed)
        elif isinstance(part, ChannelScale):
            numbers = clean.abs().amax((0, 2)).clamp(min=2.0**-7).sqrt()
        elif isinstance(part, Eigenbasis):
            heads = x.shape[1] if part.per == "head" else 1
            every = [rotation("orthogonal", clean.shape[3], seed + position + head) for head in range(heads)]
            numbers = torch.stack(every).float()
            if part.matrices == 2:
                sizes = torch.exp2(torch.randint(-2, 3, (heads, clean.shape[3], 1), generator=generator).float())
                numbers = torch.stack([numbers * sizes, (numbers / sizes).mT], 1)
        elif isinstance(part, ChannelShift):
            numbers = clean.mean((0, 2))
        elif isinstance(part, Permute):
            numbers = torch.rand(x.shape[1], clean.shape[3], generator=generator).argsort(-1).float()
        else:
            continue
        found[f"{side}.transform[{position}]"] = numbers
    if isinstance(store.outliers, Sparse) and store.outliers.when == "calibrated":
        found[f"{side}.outliers"] = thresholds(store.outliers, without_rope(store, clean.double(), found, side, 0))
    return found


def frequencies(rotated: int, seed: int) -> Tensor:
    """Rotary frequencies base^(-2i/R), float32, of R channels: of some base, sometimes with zeros."""
    some = random.Random(seed)
    some.choice(range(PARTS))  # which part is turned, see `Case.rotated`
    base = some.choice((1e4, 1e4, 5e5, 1e6, 100.0))
    found = 1.0 / base ** (torch.arange(0, rotated, 2, dtype=torch.float32) / rotated)
    return torch.where(torch.arange(len(found)) < len(found) * some.choice((1.0, 1.0, 0.25)), found, 0.0)


def static(store: Store) -> bool:
    """Whether the store's scale is calibrated."""
    return store.measure is not None and store.measure.when == "calibrated"


def given_levels(store: Store) -> Tensor | None:
    """Levels for a calibrated table, float32, uneven, from -1 to 1 or so, and others where codes are decoded at them;
    None for every other code."""
    if not isinstance(store.code, Codebook) or store.code.levels != "calibrated":
        return None
    even = torch.linspace(-1, 1, 2 ** (store.code.bits or 0), dtype=torch.float64)
    wide = 1.0 if store.measure is not None and store.measure.range in ("minmax", "minmax_zero", "absmax") else 1.7
    levels = (wide * even.sign() * even.abs() ** 1.25 + 0.01).float()
    return levels if store.code.match is None else torch.stack([levels, 1.125 * levels - 0.03])


def given_vectors(code: Vectors, x: Tensor) -> Tensor:
    """Tables of float16 numbers of about the size of those of x (B, H, T, D), float32: half of them some of x's own,
    one of them twice."""
    clean = x.double().nan_to_num(0.0).clamp(-65504, 65504)
    sizes = (x.shape[1], code.groups(x.shape[3]), 2**code.bits, code.channels)
    size = clean.abs().mean((0, 2)).reshape(sizes[0], sizes[1], 1, -1)
    found = torch.randn(sizes, generator=torch.Generator().manual_seed(code.bits)).double() * size
    rows = clean.transpose(0, 1).flatten(1, 2).unflatten(-1, (-1, code.channels)).transpose(1, 2)
    own = min(2 ** (code.bits - 1), rows.shape[2])
    found[:, :, :own] = rows[:, :, :own]
    found[:, :, -1] = found[:, :, 0]
    return found.clamp(-65504, 65504).half().float()


def given_sums(code: Additive, x: Tensor) -> Tensor:
    """Tables of float16 numbers for vectors whose numbers are about 1, float32, of stages that become finer."""
    count = code.of(x.shape[3]).count
    sizes = (x.shape[1], count, 2**code.bits, x.shape[3])
    found = torch.randn(sizes, generator=torch.Generator().manual_seed(code.bits))
    return (found * 0.75 ** torch.arange(1, count + 1)[:, None, None]).half().float()


def calibrated(store: Store, x: Tensor, share: float, side: str) -> dict[str, Tensor]:
    """The parameters of a store by name: a calibrated scale, float32 numbers that its metadata format holds where
    float32 arithmetic has that format, a second level, a table."""
    scale, found = store.measure, dict[str, Tensor]()
    table = given_vectors(store.code, x) if isinstance(store.code, Vectors) else given_levels(store)
    table = given_sums(store.code, x) if isinstance(store.code, Additive) else table
    if table is not None:
        found[f"{side}.code"] = table
    if scale is None:
        return found
    if scale.scale is not None:
        found[f"{side}.scale.scale"] = (second_level(store, x) * 0.97).float()
    if scale.when != "calibrated":
        return found
    tokens = x.transpose(0, 1).reshape(1, x.shape[1], -1, x.shape[3])
    measured = quantize(store.with_(residual=None, **{"scale.when": "online"}), tokens, found, side)
    assert measured.scale is not None
    step = measured.scale[0, :, 0] * share
    step = torch.where(step < 0, step.clamp(max=-(2.0**-14)), step.clamp(min=2.0**-14))
    parts = [step] if measured.offset is None else [step, measured.offset[0, :, 0] * share]
    exact = scale.dtype if scale.dtype in ("fp16", "bf16") else "fp32"
    rounded = [part.clamp(-65504, 65504).to(METADATA[exact]).float() for part in parts]
    found[f"{side}.scale"] = torch.stack(rounded) if len(rounded) > 1 else rounded[0]
    return found


Test = Callable[[Case], None]


@dataclass(frozen=True)
class Law:
    """A statement about every case: `test` raises LawBroken; `applies` says of which schemes it is made; `kinds` which
    numbers it is asked about (none: all); `routed`: of schemes whose cache is one of tiers, else of all others."""

    name: str
    number: str
    test: Test
    applies: Callable[[Scheme], bool]
    kinds: tuple[str, ...] = field(default=())
    routed: bool = False

    def __call__(self, case: Case) -> None:
        try:
            self.test(case)
        except LawBroken as broken:
            raise LawBroken(f"{self.name}: {broken}\nin {case}") from None
        except Exception as error:
            raise LawBroken(f"{self.name}: raised {type(error).__name__}: {error}\nin {case}") from error


LAWS: dict[str, Law] = {}


def law(
    number: str,
    applies: Callable[[Scheme], bool] = lambda _: True,
    kinds: tuple[str, ...] = (),
    *,
    routed: bool = False,
) -> Callable[[Test], Law]:
    """Enter a law into the table under its function's name and its number."""

    def enter(test: Test) -> Law:
        def made_of(scheme: Scheme) -> bool:
            return scheme.routed == routed and applies(scheme)

        LAWS[test.__name__] = made = Law(test.__name__, number, test, made_of, kinds, routed)
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
