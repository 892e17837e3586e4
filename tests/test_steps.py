"""Quotients of pack kernels: the compiled form of `device_steps`, run here in float32 arithmetic, rounds as division.

The interpreter divides, so no law that it checks says anything of the corrected products that run on a GPU.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import kvdsl.codegen

THOROUGH = os.environ.get("KVDSL_PROFILE") == "thorough"
SIGNIFICANDS = range(2**23, 2**24, 2**16)  # where chunks of them begin
STRIDE = 1 if THOROUGH else 61


def single(x: Tensor) -> Tensor:
    return x.to(torch.float32)


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c of float32 numbers, rounded once: the exact product, and a sum that is rounded to odd before."""
    product, c = a.double() * b.double(), c.double()
    total = product + c
    part = total - product
    lost = (product - (total - part)) + (c - part)
    even = total.view(torch.int64) % 2 == 0
    towards = torch.where((lost > 0) == (total > 0), 1, -1)
    odd = (total.view(torch.int64) + torch.where((lost != 0) & even, towards, 0)).view(torch.float64)
    return single(odd)


def compiled() -> dict[str, Callable[..., Tensor]]:
    """The functions that a GPU runs, from their text, over tensors of torch."""
    text = (Path(kvdsl.codegen.__file__).parent / "device_steps.py").read_text(encoding="utf-8")
    (branch,) = (node for node in ast.parse(text).body if isinstance(node, ast.If))
    tl = SimpleNamespace(
        fma=fma, where=torch.where, abs=torch.abs, clamp=torch.clamp, float32=torch.float32, constexpr=None,
        broadcast_to=lambda x, shape: x.expand(shape), full=lambda shape, value, dtype: torch.full(shape, value),
        inline_asm_elementwise=lambda text, constraints, given, **options: single(1 / given[0].double()),
        div_rn=lambda x, y: x / y, maximum=torch.maximum, reduce=None,
    )  # fmt: skip
    names: dict[str, Any] = {"tl": tl, "triton": SimpleNamespace(jit=lambda function: function)}
    exec(compile(ast.Module(branch.orelse, []), "device_steps", "exec"), names)
    return names


STEPS = compiled()


def hard(significand: Tensor, difference: int, power: int) -> tuple[Tensor, Tensor]:
    """Pairs (x, s) of significands X, S with X * 2**power = M * S + difference, M odd and of 25 bits: quotients x / s
    as near to the middle of two float32 numbers as can be."""
    twos = (significand & -significand).double().log2().to(torch.int64)
    some = (difference % (1 << twos)) == 0
    significand, twos = significand[some], twos[some]
    odd, rest = significand >> twos, -difference // (1 << twos)
    inverse = odd.clone()
    for _ in range(6):
        inverse = inverse * (2 - odd * inverse)
    step = 1 << (power - twos)
    first = (rest * inverse) % step
    xs, ss = [], []
    for turn in range(2**25 // 2**21):
        m = first + turn * step
        x = (m * significand + difference) >> power
        fits = (m % 2 == 1) & (m >= 2**24) & (m < 2**25) & (x >= 2**23) & (x < 2**24)
        fits &= (x >= significand) == (power == 24)
        xs.append(x[fits])
        ss.append(significand[fits])
    return torch.cat(xs), torch.cat(ss)


@pytest.mark.parametrize("power", [24, 25])
def test_the_nearest_quotients_to_a_middle_are_rounded_right(power: int) -> None:
    """All that one correction could get wrong: nothing else is so near.  The thorough profile tries every one."""
    tried = 0
    for begin in SIGNIFICANDS:
        for difference in (-3, -2, -1, 1, 2, 3):
            x, s = hard(torch.arange(begin, begin + 2**16, STRIDE), difference, power)
            tried += len(x)
            x, s = single(x), single(s)
            assert torch.equal(STEPS["in_steps"](x, s, False, False), x / s), (begin, difference)
    assert tried > 100_000


@pytest.mark.parametrize(("fine", "free"), [(True, False), (True, True)])
def test_small_scales_and_their_numbers_are_lifted(fine: bool, free: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    s = torch.randint(1, 0x7F7FFFFF, (400_000,), generator=generator, dtype=torch.int32).view(torch.float32)
    s = torch.where(s > 2**15, s * 2**-100, s)
    x = single(s.double() * (torch.rand(s.shape, generator=generator).double() * 500 - 250))
    x = torch.where(x.abs() < 1e5, x, 1.0)
    got, want = STEPS["in_steps"](x, s, fine, free), x / s
    same = (got == want) | (want.abs() < 2.0**-100)
    assert bool(same.all()), (x[~same][0], s[~same][0])
    if free:  # any number of steps: as many as there may be, with a sign
        far = STEPS["in_steps"](torch.tensor([6e4, -6e4]), torch.tensor([1e-40, 1e-44]), fine, free)
        assert far[0] > 1e9 and far[1] < -1e9


def test_numbers_over_a_scale_of_zero_are_zero() -> None:
    x, zero = torch.tensor([3.0, -3.0, 0.0]), torch.zeros(3)
    assert not STEPS["in_steps"](x, zero, True, True).any() and not STEPS["in_steps"](x, zero, False, False).any()
    assert not STEPS["in_half_steps"](x, zero).any()


def test_every_float16_scale_divides_exactly_by_any_inverse_near_its_own() -> None:
    scale = torch.arange(1, 0x7C00, dtype=torch.int16).view(torch.float16).to(torch.float32)
    generator = torch.Generator().manual_seed(2)
    for off in (-1, 0, 1):
        inverse = (single(1 / scale.double()).view(torch.int32) + off).view(torch.float32)
        for _ in range(20):
            x = single(scale.double() * (torch.rand(scale.shape, generator=generator).double() * 300))
            assert torch.equal(STEPS["corrected"](x, scale, inverse, x * inverse), x / scale)


@pytest.mark.parametrize("divisor", [1, 3, 7, 15, 31, 63, 127, 255, 1023, 4095])
def test_odd_divisors_are_corrected_once_subnormal_numbers_too(divisor: int) -> None:
    generator = torch.Generator().manual_seed(divisor)
    bits = torch.randint(0, 0x48800000, (300_000,), generator=generator, dtype=torch.int32)
    bits[:100_000] %= 0x02000000  # subnormal ones, and those whose quotients are
    x = bits.view(torch.float32)
    assert torch.equal(STEPS["over"](x, float(divisor)), single(x.double() / divisor))
