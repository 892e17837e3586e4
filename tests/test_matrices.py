"""The matrices of rotations and sketches: orthogonal, drawn from their seed alone, of known mean length."""

from __future__ import annotations

import math

import pytest
import torch

from kvdsl.matrices import estimator, excess, product, rotation, sketch
from kvdsl.scheme import Sketch


def far_from_one(matrix: torch.Tensor) -> float:
    return float((matrix @ matrix.T - torch.eye(len(matrix), dtype=torch.float64)).abs().max())


@pytest.mark.parametrize("kind", ["hadamard", "random_hadamard", "orthogonal"])
@pytest.mark.parametrize("size", [2, 16, 64, 128, 256])
def test_p17_p18_a_rotation_is_orthonormal(kind: str, size: int) -> None:
    matrix = rotation(kind, size, 5)
    assert matrix.dtype is torch.float64 and matrix.shape == (size, size)
    assert far_from_one(matrix) < 1e-13
    assert torch.equal(matrix, rotation(kind, size, 5))
    assert (kind == "hadamard") == torch.equal(matrix, rotation(kind, size, 6))


def test_cancelled_terms_of_a_product_are_zero() -> None:
    """1/sqrt(32) is no float64 and what its rounding leaves is taken away; small numbers that are meant are not."""
    a, b = (rotation("random_hadamard", 32, seed) for seed in (3, 1))
    exact = ((a * 32**0.5).round() @ (b * 32**0.5).round()) / 32
    assert (exact == 0).any() and ((a @ b)[exact == 0] != 0).any()
    assert torch.equal(product(a, b) == 0, exact == 0) and (product(a, b) - exact).abs().max() < 1e-15
    small = torch.diag(torch.tensor([1.0, 1e-300], dtype=torch.float64))
    assert torch.equal(product(small, torch.ones(2, 2, dtype=torch.float64)), small.sum(1, keepdim=True).expand(2, 2))


def test_p17_hadamard() -> None:
    assert (rotation("hadamard", 4) * 2).tolist() == [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    matrix = rotation("hadamard", 128)
    assert torch.equal(matrix, matrix.T)
    for size in (3, 80, 96):
        with pytest.raises(ValueError, match=f"{size} is no power of two"):
            rotation("hadamard", size)


def test_blocks() -> None:
    whole, block = rotation("orthogonal", 16, 1, 48), rotation("orthogonal", 16, 1)
    assert torch.equal(whole, torch.block_diag(block, block, block))
    whole = rotation("random_hadamard", 32, 1, 96)
    signs = whole[::32].sum(0) * math.sqrt(32)
    assert torch.equal(whole, torch.block_diag(*[rotation("hadamard", 32)] * 3) * signs.round())
    assert not torch.equal(signs[:32].round(), signs[32:64].round()) and far_from_one(whole) < 1e-13
    with pytest.raises(ValueError, match="96 channels are no whole number of blocks of 64"):
        rotation("hadamard", 64, None, 96)


def test_numbers_that_must_never_change() -> None:
    """A cache that was written with one version is read with the next."""
    assert rotation("orthogonal", 4, 0)[0].tolist() == pytest.approx(FIRST_ROW, abs=1e-15)
    assert (rotation("random_hadamard", 8, 0)[0] > 0).int().tolist() == SIGNS
    assert sketch(3, 4, "gaussian", 0)[0].tolist() == pytest.approx(GAUSSIAN, abs=1e-15)


FIRST_ROW = [0.0504791629556993, -0.12468065699085006, 0.44557229035821955, -0.8850830028559765]
SIGNS = [0, 0, 0, 1, 1, 1, 1, 1]
GAUSSIAN = [0.1257302210933933, -0.1321048632913019, 0.6404226504432821, 0.10490011715303971]


@pytest.mark.parametrize("basis", ["orthogonal", "hadamard"])
@pytest.mark.parametrize(("dim", "channels"), [(64, 64), (160, 64), (24, 32), (512, 128)])
def test_rows_of_a_sketch_are_orthogonal_in_blocks(basis: str, dim: int, channels: int) -> None:
    matrix = sketch(dim, channels, basis, 3)
    assert matrix.shape == (dim, channels) and torch.equal(matrix, sketch(dim, channels, basis, 3))
    blocks = matrix.split(channels)
    for block in blocks:
        gram = block @ block.T / channels
        assert torch.allclose(gram, torch.eye(len(block), dtype=torch.float64), atol=1e-13)
    assert len(blocks) == 1 or not torch.equal(blocks[0][: len(blocks[-1])], blocks[-1])
    if basis == "hadamard":
        assert (matrix.abs() == 1).all()


def test_a_gaussian_sketch_is_gaussian() -> None:
    matrix = sketch(1024, 256, "gaussian", 1)
    assert abs(matrix.mean()) < 4 / 512 and matrix.var().item() == pytest.approx(1, abs=4 * math.sqrt(2) / 512)


def test_p8_the_constant() -> None:
    right = {32: 1.00784, 64: 1.00391, 80: 1.00313, 96: 1.00261, 128: 1.00195, 256: 1.00098}
    for channels, constant in right.items():
        assert excess("orthogonal", channels) == pytest.approx(constant, abs=6e-6)
        assert excess("gaussian", channels) == 1
    # d = 2: E|x_1| on the unit circle is 2/pi, against sqrt(2/pi) for a normal number: times sqrt(2)
    assert excess("hadamard", 2) == pytest.approx(2 / math.pi * math.sqrt(2) / math.sqrt(2 / math.pi), abs=1e-14)
    assert estimator(Sketch(512, basis="gaussian"), 64) == pytest.approx(8 * math.sqrt(math.pi / 2) / 512, abs=1e-15)
    assert estimator(Sketch(), 64) == pytest.approx(8 * math.sqrt(math.pi / 2) / 64 / 1.003914, abs=1e-7)
