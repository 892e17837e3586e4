"""The tables of the laws: published values, the two conditions of an optimum, and other laws' known limits."""

from __future__ import annotations

import math

import pytest

from kvdsl.levels import optimal, table
from kvdsl.scheme import Codebook

# P13: mean squared errors and the upper half of the centroids for the normal law
ERRORS = (0.36338023, 0.11748185, 0.03454776, 0.00950101, 0.00250467, 0.00064424, 0.00016348, 0.00004119)
CENTROIDS = {
    1: [0.797885],
    2: [0.452780, 1.510418],
    3: [0.245094, 0.756005, 1.343909, 2.151946],
    4: [0.128395, 0.388048, 0.656759, 0.942340, 1.256231, 1.618046, 2.069017, 2.732590],
}
BETA = {
    1: {64: 0.358387, 128: 0.360889, 256: 0.362136},
    2: {64: 0.114526, 128: 0.116000, 256: 0.116740},
    3: {64: 0.033391, 128: 0.033966, 256: 0.034256},
    4: {64: 0.009132, 128: 0.009315, 256: 0.009408},
}


@pytest.mark.parametrize("bits", range(1, 9))
def test_p13_normal(bits: int) -> None:
    levels, error = optimal("normal", 1 << bits)
    assert error == pytest.approx(ERRORS[bits - 1], abs=6e-9)
    assert list(levels[len(levels) // 2 :]) == pytest.approx(CENTROIDS.get(bits, levels[len(levels) // 2 :]), abs=6e-7)
    assert levels == tuple(-level for level in reversed(levels)) and list(levels) == sorted(levels)


@pytest.mark.parametrize("bits", BETA)
def test_p13_beta(bits: int) -> None:
    for channels, error in BETA[bits].items():
        assert optimal("beta", 1 << bits, channels)[1] == pytest.approx(error, abs=6e-7)
    assert table(Codebook(bits, "beta"), 1 << 20) == pytest.approx(table(Codebook(bits), 64), abs=1e-5)


@pytest.mark.parametrize("bits", range(1, 9))
def test_p13_between_the_bounds_of_the_paper(bits: int) -> None:
    """4^-b of any code at all, and sqrt(3) pi/2 times that, which tables come up to: of the normal law and of
    coordinates, whose errors rise to it."""
    high = math.sqrt(3) * math.pi / 2
    widths = (16, 64, 128, 256) if bits <= 5 else ()
    errors = [optimal("beta", 1 << bits, d)[1] for d in widths] + [optimal("normal", 1 << bits)[1]]
    times = [error * 4**bits for error in errors]
    assert all(1 < time < high for time in times) and times == sorted(times)
    right = (1.4535, 1.8797, 2.2111, 2.4323, 2.5648, 2.6388, 2.6784, 2.6991)[bits - 1]
    assert times[-1] == pytest.approx(right, abs=2e-4)


def test_p13_codes_are_nearly_as_short_as_they_can_be() -> None:
    """Their entropy under the normal law, in bits."""
    from statistics import NormalDist

    for bits, right in {1: 1, 2: 1.911, 3: 2.825, 4: 3.765}.items():
        levels = optimal("normal", 1 << bits)[0]
        below = [0.0, *(NormalDist().cdf((a + b) / 2) for a, b in zip(levels, levels[1:], strict=False)), 1.0]
        shares = [b - a for a, b in zip(below, below[1:], strict=False)]
        assert -sum(p * math.log2(p) for p in shares) == pytest.approx(right, abs=6e-4)


def test_three_levels() -> None:
    levels, error = optimal("normal", 3)
    assert error == pytest.approx(0.19017404, abs=6e-9)
    assert levels[1] == 0 and levels[2] == pytest.approx(1.2240, abs=5e-5)


def test_by_hand() -> None:
    """One bit: the mean of |x|, sqrt(2/pi) for the normal law and 2/pi * sqrt(2) for a point of a circle."""
    assert optimal("normal", 2)[0][1] == pytest.approx(math.sqrt(2 / math.pi), abs=1e-14)
    assert optimal("beta", 2, 2)[0][1] == pytest.approx(2 / math.pi * math.sqrt(2), abs=1e-14)
    # on a ball of 3 dimensions a coordinate is even on (-sqrt 3, sqrt 3): levels are the middles of equal cells
    assert optimal("beta", 4, 3)[0] == pytest.approx([math.sqrt(3) * k / 4 for k in (-3, -1, 1, 3)], abs=1e-12)


@pytest.mark.parametrize("channels", [2, 3, 16, 128])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_a_level_is_the_mean_of_its_cell(bits: int, channels: int) -> None:
    """By a plain sum over a fine grid of t, where a coordinate is sqrt(d) sin t with density cos(t)^(d-2)."""
    import numpy as np

    t = (np.arange(2_000_000) + 0.5) / 2_000_000 * math.pi - math.pi / 2
    x, weight = math.sqrt(channels) * np.sin(t), np.cos(t) ** (channels - 2)
    levels = np.array(optimal("beta", 1 << bits, channels)[0])
    cell = np.searchsorted((levels[1:] + levels[:-1]) / 2, x)
    means = np.bincount(cell, x * weight) / np.bincount(cell, weight)
    assert means == pytest.approx(levels, abs=2e-5)


def test_given_numbers_stay_as_they_are() -> None:
    assert table(Codebook(levels=(-1, 0, 1)), 64) == (-1.0, 0.0, 1.0)
    with pytest.raises(ValueError, match="calibrated"):
        table(Codebook(2, "calibrated"), 64)
    with pytest.raises(ValueError, match="2 or more"):
        optimal("beta", 4, 1)
