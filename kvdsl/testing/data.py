"""Numbers that find mistakes: each kind a function of a seed, so that a failure is told by a name and an integer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from kvdsl.inputs import DTYPES

Size = tuple[int, int, int, int]
Kind = Callable[[Size, Generator], Tensor]


def numbers(kind: str, size: Size, dtype: str, seed: int) -> Tensor:
    """A tensor (B, H, T, D) of `KINDS[kind]` in a model's dtype ("fp16", "bf16", "fp32"), equal for equal seeds."""
    generator = Generator().manual_seed(seed)
    return KINDS[kind](size, generator).to(DTYPES[dtype])


def normal(size: Size, generator: Generator) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(size, generator=generator)


def outlier_channel(size: Size, generator: Generator) -> Tensor:
    """Normal, with one channel of each head a thousand times larger, as keys of real models have."""
    x = normal(size, generator)
    x[..., int(torch.randint(size[3], (), generator=generator))] *= 1000
    return x


def offset(size: Size, generator: Generator) -> Tensor:
    """Normal numbers far from zero: the range is small beside the minimum."""
    return normal(size, generator) * 0.25 - 8


def positive(size: Size, generator: Generator) -> Tensor:
    """All of one sign, so that a range that must hold 0 is wider than the numbers."""
    return normal(size, generator).abs() + 0.5


def constant(size: Size, generator: Generator) -> Tensor:
    """One number everywhere: a range of zero."""
    return torch.full(size, float(normal((1, 1, 1, 1), generator)))


def zeros(size: Size, generator: Generator) -> Tensor:
    """Nothing but zeros, of both signs."""
    return torch.where(torch.rand(size, generator=generator) < 0.5, 0.0, -0.0)


def all_but_one(size: Size, generator: Generator) -> Tensor:
    """One number differs from all others."""
    x = torch.ones(size)
    x.view(-1)[int(torch.randint(x.numel(), (), generator=generator))] = 3.0
    return x


def one_hot(size: Size, generator: Generator) -> Tensor:
    """One channel of each token is 1, the others 0."""
    return torch.zeros(size).scatter_(3, torch.randint(size[3], (*size[:3], 1), generator=generator), 1.0)


def alternating(size: Size, generator: Generator) -> Tensor:
    """+1 and -1 in turn: two values, both ends of the range."""
    return torch.where(torch.arange(size[3]) % 2 == 0, 1.0, -1.0).expand(size).clone()


def ties(size: Size, generator: Generator) -> Tensor:
    """Halves of small integers: with a step of one, each odd half lies midway between two codes."""
    return torch.randint(-16, 17, size, generator=generator) / 2


def tiny(size: Size, generator: Generator) -> Tensor:
    """Ranges near 2e-7: fp16 scales become subnormal, so codes must be clamped."""
    return normal(size, generator) * 2e-7


def subnormal(size: Size, generator: Generator) -> Tensor:
    """Multiples of the smallest fp16 number: ranges below every scale that fp16 can hold."""
    return torch.randint(-40, 41, size, generator=generator) * 2.0**-24


def huge(size: Size, generator: Generator) -> Tensor:
    """Both ends of fp16: differences overflow it."""
    return normal(size, generator).sign() * 6e4 + normal(size, generator) * 500


KINDS: dict[str, Kind] = {
    function.__name__: function
    for function in (
        normal, outlier_channel, offset, positive, constant, zeros, all_but_one, one_hot, alternating, ties, tiny,
        subnormal, huge,
    )
}  # fmt: skip
MODEST = ("normal", "outlier_channel", "offset", "positive", "one_hot", "alternating", "ties")
"""Kinds whose attention is worth comparing: neither overflow nor nothing but ties in the softmax."""
