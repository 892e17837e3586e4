"""The levels of a codebook: the best few numbers for a law (Lloyd-Max), computed once for each law and count.

A table of n levels is best when every level is the mean of its cell and every border the middle of its two levels.
That is a system of n equations with a symmetric, tridiagonal Jacobian; Newton's steps solve it to the last digits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from .codes import Codebook

if TYPE_CHECKING:
    import numpy as np

STEPS = 400
CLOSE = 1e-12
FAR = 16.0  # standard deviations beyond which nothing of a law is left
NODES = 96  # of the Gauss-Legendre rule over one cell of the beta law


def table(code: Codebook, channels: int) -> tuple[float, ...]:
    """The levels of a codebook for blocks of `channels` channels, rising; the numbers of a given table as they are.

    Raises ValueError for `calibrated`, whose levels come with the parameters, and for a law without bits.
    """
    if isinstance(code.levels, tuple):
        return tuple(float(level) for level in code.levels)
    if code.levels == "calibrated" or code.bits is None:
        raise ValueError(f"{code!r} names no law and number of levels; its table comes from elsewhere")
    if code.levels == "angle":
        return angles(1 << code.bits, channels)
    return optimal(code.levels, 1 << code.bits, channels if code.levels == "beta" else 0)[0]


def angles(levels: int, channels: int) -> tuple[float, ...]:
    """The best table for the angle, in radians, between the halves of a normal vector of `channels` numbers: of two the
    whole circle, all angles alike; of more, between the halves' norms, with a density of sin(2a)^(channels/2 - 1) on
    [0, pi/2] (PolarQuant, arXiv 2502.02617, lemma 2)."""
    if channels == 2:
        return tuple((i + 0.5) * 2 * math.pi / levels for i in range(levels))
    return tuple(math.pi / 4 + point / 2 for point in optimal("angle", levels, channels)[0])


@lru_cache(maxsize=256)
def optimal(law: str, levels: int, channels: int = 0) -> tuple[tuple[float, ...], float]:
    """(levels, mean squared error) of the best table for a law of mean 0, and variance 1 but for `angle`.

    `normal`, or `beta`: sqrt(channels) times a coordinate of a uniformly random unit vector of `channels` numbers;
    `angle`: twice what an angle is from an eighth of a turn, as in `angles`.
    """
    import numpy as np

    if law == "beta" and channels < 2:
        raise ValueError(f"a unit vector of {channels} channels has no density; give 2 or more")
    f = _normal() if law == "normal" else _angle(channels) if law == "angle" else _beta(channels)
    # The best density of levels is the cube root of the law's own: a normal one, sqrt(3) times as wide.
    points = np.array([math.sqrt(3) * _quantile((i + 0.5) / levels) for i in range(levels)])
    points *= min(1, 0.9 * f.end / points[-1])
    for _ in range(STEPS):
        inner = (points[1:] + points[:-1]) / 2
        borders = np.concatenate([[-f.end], inner, [f.end]])
        mass, mean = f.mass(borders), f.moment(borders)
        side = (inner - points[:-1]) * np.array([f.density(b) for b in inner]) / 2  # > 0; the same from the right
        jacobian = np.diag(mass - np.append(side, 0) - np.insert(side, 0, 0)) - np.diag(side, 1) - np.diag(side, -1)
        # Far from the optimum the equations may be no minimum's: there each level goes to the mean of its cell.
        convex = np.linalg.eigvalsh(jacobian)[0] > 0
        step = np.linalg.solve(jacobian, points * mass - mean) if convex else points - mean / mass
        points = points - step * min(1, np.diff(points).min() / 3 / max(np.abs(step).max(), CLOSE))
        if np.abs(step).max() < CLOSE:
            break
    points = (points - points[::-1]) / 2  # the laws are symmetric, and so is the table to the last bit
    return tuple(float(p) for p in points), f.variance - float((points * mean).sum())


class _Law(NamedTuple):
    """A symmetric law on (-end, end): its density, and masses and first moments between rising borders."""

    end: float
    density: Callable[[float], float]
    mass: Callable[[np.ndarray], np.ndarray]
    moment: Callable[[np.ndarray], np.ndarray]
    variance: float = 1.0


def _normal() -> _Law:
    import numpy as np

    def density(x: float) -> float:
        return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)

    def mass(borders: np.ndarray) -> np.ndarray:
        # The tail on the far side of 0 from each cell, so that no digits are lost between two numbers close to 1.
        def between(a: float, b: float) -> float:
            if a < 0 < b:
                return 1 - (math.erfc(-a / math.sqrt(2)) + math.erfc(b / math.sqrt(2))) / 2
            a, b = min(abs(a), abs(b)), max(abs(a), abs(b))
            return (math.erfc(a / math.sqrt(2)) - math.erfc(b / math.sqrt(2))) / 2

        return np.array([between(a, b) for a, b in zip(borders[:-1], borders[1:], strict=True)])

    def moment(borders: np.ndarray) -> np.ndarray:
        return -np.diff(np.array([density(b) for b in borders]))

    return _Law(math.inf, density, mass, moment)


def _beta(d: int) -> _Law:
    """u = sqrt(d) sin t has the density c * cos(t)^(d-2) in t, smooth for every d."""
    import numpy as np

    root = math.sqrt(d)
    factor = math.exp(math.lgamma(d / 2) - math.lgamma((d - 1) / 2)) / math.sqrt(math.pi)
    nodes, weights = np.polynomial.legendre.leggauss(NODES)

    def density(x: float) -> float:
        return factor / root * (1 - x * x / d) ** ((d - 3) / 2)

    def mass(borders: np.ndarray) -> np.ndarray:
        angle = np.arcsin(np.clip(np.clip(borders, -FAR, FAR) / root, -1, 1))
        middle, half = (angle[1:] + angle[:-1]) / 2, (angle[1:] - angle[:-1]) / 2
        return factor * half * (weights * np.cos(middle[:, None] + half[:, None] * nodes) ** (d - 2)).sum(1)

    def moment(borders: np.ndarray) -> np.ndarray:
        return -factor * root / (d - 1) * np.diff(np.clip(1 - borders**2 / d, 0, 1) ** ((d - 1) / 2))

    return _Law(root, density, mass, moment)


def _angle(channels: int) -> _Law:
    """The density c * cos(t)^(channels/2 - 1) of t on (-pi/2, pi/2)."""
    import numpy as np

    power, half = channels / 2 - 1, math.pi / 2
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    factor = math.exp(math.lgamma(power / 2 + 1) - math.lgamma((power + 1) / 2)) / math.sqrt(math.pi)

    def over(borders: np.ndarray, degree: int) -> np.ndarray:
        """Integrals of t^degree times the density between neighbouring borders."""
        middle, wide = (borders[1:] + borders[:-1]) / 2, (borders[1:] - borders[:-1]) / 2
        t = middle[:, None] + wide[:, None] * nodes
        return factor * wide * (weights * t**degree * np.cos(t) ** power).sum(1)

    variance = float(over(np.array([-half, 0.0, half]), 2).sum())
    return _Law(half, lambda t: factor * math.cos(t) ** power, lambda b: over(b, 0), lambda b: over(b, 1), variance)


def _quantile(p: float) -> float:
    from statistics import NormalDist

    return NormalDist().inv_cdf(p)
