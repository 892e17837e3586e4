"""What formats of serving engines do at their edges: ends of ranges, ranges far from 0, blocks of one number."""

from __future__ import annotations

import pytest
import torch

from kvdsl import reference
from kvdsl.scheme import Scheme
from kvdsl.schemes import (
    exl3_4,
    int4_token_head,
    int4_token_head_free,
    int4_token_head_held,
    lmdeploy_k4v2,
    mxfp4,
    mxfp8,
    octave_compact,
    octave_k3v4,
    ultraquant4,
)


def read(scheme: Scheme, x: torch.Tensor) -> torch.Tensor:
    """Keys as they are read, by the definition: (tokens, channels) each."""
    return reference.roundtrip(scheme, x[None, None], x[None, None], window=False)[0][0, 0]


def test_the_largest_number_of_cells_is_read_half_a_step_too_small() -> None:
    """exllamav3: the code of max|y| would be 16, and is held to 15, whose cell's middle is 15/16 of it."""
    plain = exl3_4.with_(transform=())
    x = torch.linspace(-8, 8, 32)[None]
    assert read(plain, x)[0, -1] == 7.5 and read(plain, x)[0, 0] == -7.5


@pytest.mark.parametrize("scheme", [octave_k3v4, octave_compact], ids=["octave_k3v4", "octave_compact"])
def test_what_octave_reads_has_the_product_with_what_was_written(scheme: Scheme) -> None:
    """<x,x^> = <x,x>, but for the rounding of a scale to fp16; a scale of least squares would lose 0.9 or 3.5 %."""
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(5)) * torch.logspace(-1, 2, 64)[:, None]
    gain = (x * read(scheme, x)).sum(1) / x.square().sum(1)
    assert (gain - 1).abs().max() < 1e-3
    least = read(scheme.with_(refit="least_squares"), x)
    assert ((x * least).sum(1) / x.square().sum(1)).max() < 0.995


def test_signs_of_what_a_table_leaves_have_one_amplitude_a_token() -> None:
    """lmdeploy: what the residual adds to a key, before it is rotated back, is +-a, a the root mean square of what the
    table left; a mean of sizes in its place errs a tenth less."""
    flat = lmdeploy_k4v2.with_(transform=(), **{"keys.residual.transform": ()})
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(6))
    alone = read(flat.with_(**{"keys.residual": None}), x)
    added = (read(flat, x) - alone).abs()
    assert torch.allclose(added, (x - alone).square().mean(1, keepdim=True).sqrt().expand(-1, 128), rtol=1e-3)
    smaller = read(flat.with_(**{"keys.residual.scale.range": "absmean"}), x)
    assert 0.85 < (smaller - x).square().mean() / (read(flat, x) - x).square().mean() < 0.95


@pytest.mark.parametrize(
    ("rule", "clip", "right"),
    [("round", 0.936, 0.0178), ("round", 1.2, 0.0125), ("floor", 1.0, 0.0132), ("ceil", 1.0, 0.0133)],
)
def test_the_rule_of_a_power_of_two_decides_what_four_bits_lose(rule: str, clip: float, right: float) -> None:
    """UltraQuant's constant of 0.156 lets too many numbers saturate: 0.2 would lose a third less."""
    x = torch.randn(1024, 128, generator=torch.Generator().manual_seed(7))
    one = ultraquant4.with_(transform=(), exponent=rule, clip=clip)
    assert (read(one, x) - x).square().mean().item() == pytest.approx(right, rel=0.015)


def test_powers_that_are_rounded_up_saturate_nothing() -> None:
    """mxfp8 reads the largest number of 32 within a sixteenth of it; rounded down, powers halve some of them."""
    x = torch.logspace(-3, 3, 4096)[:, None].expand(-1, 32)
    off = (read(mxfp8, x) - x).abs() / x
    assert off.max() <= 2**-4 and (read(mxfp4, x) < x * 0.76).any()


@pytest.mark.parametrize(
    ("scheme", "right"),
    [(int4_token_head_held, 0.142), (int4_token_head, 6.5e-4), (int4_token_head_free, 1.55e-4)],
    ids=["held", "widened", "free"],
)
def test_a_zero_point_among_the_codes_loses_a_range_without_zero(scheme: Scheme, right: float) -> None:
    """N(8, 1), as it is coded: held to 0..15, the zero point of vLLM's kernels costs a thousand times the error."""
    x = torch.randn(1024, 128, generator=torch.Generator().manual_seed(8)) + 8
    found = read(scheme.with_(transform=()), x)
    assert ((found - x).square().sum() / x.square().sum()).item() == pytest.approx(right, rel=0.05)


def test_a_vector_of_one_number_is_lost_or_kept() -> None:
    """Its range is 0: a step of 0 where the zero point is among the codes, the number itself where it is not."""
    x = torch.full((2, 128), 3.0)
    assert not read(int4_token_head_held.with_(transform=()), x).any()
    assert torch.equal(read(int4_token_head_free.with_(transform=()), x), x.double())
    assert read(lmdeploy_k4v2, x).isfinite().all() and read(exl3_4, x).isfinite().all()
