"""The matrices of rotations and sketches: a function of kind, size and seed alone, the same on every machine.

Random numbers come from numpy's PCG64 on the CPU.  Sums run row after row, never through a library whose order of
summation is its own, so that no digit depends on where a matrix was made.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from .codes import Sketch
from .part import Sizes, counted

if TYPE_CHECKING:
    from torch import Tensor


def rotation(kind: str, size: int | Sizes, seed: int | None = None, channels: int | None = None) -> Tensor:
    """The orthonormal matrix of a rotation, float64: size x size, or channels x channels with that block repeated; of
    several sizes, or shares of `channels`, one block behind the other, each from the next seed.

    `random_hadamard` draws a sign for each of the channels, so that its blocks differ.  Raises ValueError for a
    Hadamard matrix whose size is no power of two, and for channels that are no whole number of blocks.
    """
    import torch

    if isinstance(size, tuple):
        blocks = counted(size, sum(size) if channels is None else channels)  # type: ignore[arg-type]
        return torch.block_diag(*(rotation(kind, one, (seed or 0) + i) for i, one in enumerate(blocks)))
    channels = size if channels is None else channels
    if channels % size:
        raise ValueError(f"{channels} channels are no whole number of blocks of {size}")
    return torch.from_numpy(_rotation(kind, size, 0 if seed is None else seed, channels).copy())


def sketch(dim: int, channels: int, basis: str, seed: int) -> Tensor:
    """The matrix S of a sketch, (dim, channels) float64; rows have length sqrt(channels), Gaussian ones in the mean.

    Rows of `orthogonal` and `hadamard` are orthogonal within each block of `channels` rows; the last block may be cut.
    """
    import torch

    return torch.from_numpy(_sketch(dim, channels, basis, seed).copy())


def start(rank: int, channels: int, seed: int) -> Tensor:
    """The first vectors of a subspace iteration, (rank, channels) float64, independent normal numbers."""
    import torch

    return torch.from_numpy(_generator(seed).standard_normal((rank, channels)))


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of float64 matrices (..., M, N) and (..., N, K), exactly 0 where the terms of a sum cancel.

    Rounding leaves up to N 2^-53 of the terms' sizes there, and how much depends on the order of summation; a number
    that is 0 in one order and not in another would have either sign.
    """
    found, sizes = a @ b, a.abs() @ b.abs()
    return found.masked_fill(found.abs() <= a.shape[-1] * 2.0**-52 * sizes, 0.0)


def estimator(sketch: Sketch, channels: int) -> float:
    """The level a that stands for +1: with s the root mean square of x, s * a * S^T sign(S x) is x in the mean."""
    dim = sketch.dim if isinstance(sketch.dim, int) else channels
    return math.sqrt(channels) * math.sqrt(math.pi / 2) / (dim * excess(sketch.basis, channels))


def excess(basis: str, channels: int) -> float:
    """c_d, by which rows of exact length sqrt(d) overestimate a product: sqrt(d/2) Gamma(d/2) / Gamma((d+1)/2)."""
    if basis == "gaussian":
        return 1.0
    return math.sqrt(channels / 2) * math.exp(math.lgamma(channels / 2) - math.lgamma((channels + 1) / 2))


@lru_cache(maxsize=32)
def _rotation(kind: str, size: int, seed: int, channels: int) -> Any:
    import numpy as np

    if kind == "orthogonal":
        block = _orthogonal(_generator(seed), size)
    else:
        block = _reversal(size) if kind == "bit_reversal" else _hadamard(size) / math.sqrt(size)
    whole = np.zeros((channels, channels))
    for first in range(0, channels, size):
        whole[first : first + size, first : first + size] = block
    return whole * _signs(_generator(seed), channels) if kind == "random_hadamard" else whole


@lru_cache(maxsize=32)
def _sketch(dim: int, channels: int, basis: str, seed: int) -> Any:
    import numpy as np

    generator = _generator(seed)
    if basis == "gaussian":
        return generator.standard_normal((dim, channels))
    blocks = []
    for first in range(0, dim, channels):
        rows = min(channels, dim - first)
        if basis == "orthogonal":
            block = math.sqrt(channels) * _orthogonal(generator, channels)
        else:
            block = _hadamard(channels) * _signs(generator, channels)
            block = block[generator.permutation(channels)] if rows < channels else block
        blocks.append(block[:rows])
    return np.concatenate(blocks)


def _generator(seed: int) -> Any:
    import numpy as np

    return np.random.Generator(np.random.PCG64(seed))


def _signs(generator: Any, count: int) -> Any:
    return 1.0 - 2.0 * generator.integers(0, 2, count)


def _hadamard(size: int) -> Any:
    """Sylvester's matrix of -1 and 1, symmetric, the first row all 1."""
    import numpy as np

    if size < 1 or size & (size - 1):
        raise ValueError(f"a Hadamard matrix of {size} channels: {size} is no power of two")
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def _reversal(size: int) -> Any:
    """The permutation whose row i has its 1 where the bits of i stand in reverse order."""
    import numpy as np

    bits = size.bit_length() - 1
    if size != 1 << bits:
        raise ValueError(f"{size} indices in the order of their reversed bits: {size} is no power of two")
    order = [int(f"{i:0{bits}b}"[::-1], 2) if bits else 0 for i in range(size)]
    return np.eye(size)[order]


def _orthogonal(generator: Any, size: int) -> Any:
    """Q of the QR factorisation of a normal matrix with R's diagonal positive: Gram and Schmidt's, twice."""
    columns = generator.standard_normal((size, size))
    for _ in range(2):
        for i in range(size):
            columns[:, i] /= math.sqrt(math.fsum(columns[:, i] ** 2))
            unit = columns[:, i, None]
            rest = columns[:, i + 1 :]
            rest -= unit * (unit * rest).sum(0)
    return columns
