"""Hadamard rotations in Triton's interpreter: sums and differences are the product with the matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from kvdsl.codegen.device import hadamard
from kvdsl.codegen.host_maps import sign_words
from kvdsl.codegen.plan import plan_for
from kvdsl.codegen.triton_turn import entry
from kvdsl.matrices import rotation
from kvdsl.scheme import Codebook, PreRope, Rotate, Scheme, Store, Uniform, per_token
from kvdsl.shape import Shape
from kvdsl.testing import LAWS, Case


@triton.jit  # type: ignore[untyped-decorator]
def product(  # type: ignore[no-untyped-def]
    x_ptr, y_ptr, ROWS: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr, FACTOR: tl.constexpr
):
    place = tl.arange(0, ROWS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(y_ptr + place, hadamard(tl.load(x_ptr + place).to(tl.float64), STAGES, FACTOR))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("width", "stages"), [(128, 7), (128, 5), (64, 3), (32, 1), (256, 8), (16, 0)])
def test_sums_are_the_product_with_the_matrix(width: int, stages: int, dtype: torch.dtype) -> None:
    """Exactly where float64 holds the sums, else to its rounding; a zero has no sign."""
    generator = torch.Generator().manual_seed(width + stages)
    x = (torch.randn(6, width, generator=generator) * 9).to(dtype)
    x[0], x[1, 1:], x[2] = -0.0, 0.0, 1.0
    rows = torch.nn.functional.pad(x, (0, 0, 0, 2)).contiguous()
    y = torch.empty(8, width, dtype=torch.float64)
    product[(1,)](rows.float(), y, 8, width, stages, entry(1 << stages))
    matrix = rotation("hadamard", 1 << stages, None, width).float().double()
    right = x.double() @ matrix.mT
    if dtype is torch.float32:
        assert bool(((y[:6] - right).abs() <= 2.0**-50 * (x.double().abs() @ matrix.abs().mT)).all())
    else:
        assert torch.equal(y[:6], right)
    assert not bool(y[y == 0].signbit().any())


def both(rotate: Rotate, **more: Any) -> Scheme:
    """Levels beside a table, and a few tokens that reach the next page."""
    values = Store(Codebook(3), scale=per_token(), transform=rotate)
    return Scheme(keys=Store(Uniform(4), scale=per_token(channels=32), transform=rotate), values=values, **more)


SCHEMES = {
    "whole": (both(Rotate("hadamard")), 128),
    "signs": (both(Rotate("random_hadamard", seed=3)), 128),
    "blocks": (both(Rotate("random_hadamard", size=32, seed=5)), 96),
    "rope": (
        both(Rotate("hadamard", size=32)).with_(keys=Store(
            Uniform(4), scale=per_token(), transform=(PreRope(), Rotate("random_hadamard", size=16, seed=1))
        )),
        96,
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("name", SCHEMES)
def test_what_is_coded_is_the_product_with_the_matrix(name: str, dtype: Any) -> None:
    scheme, dim = SCHEMES[name]
    case = Case(scheme, Shape(dim, 1, 1, dtype=dtype), "triton", batch=1, tokens=33, seed=2)
    LAWS["words_equal_the_reference"](case)
    if dtype == "fp16":
        LAWS["decoding_equals_the_reference"](case)


@pytest.mark.parametrize("law", ["a_nan_spoils_its_block_only", "infinity_saturates"])
def test_what_is_no_number_reaches_all_blocks(law: str) -> None:
    scheme, dim = SCHEMES["blocks"]
    LAWS[law](Case(scheme, Shape(dim, 1, 1), "triton", batch=1, tokens=33, seed=4))


@pytest.mark.parametrize(
    ("bits", "rotate", "dim", "dtype", "own"),
    [
        (8, Rotate("hadamard"), 128, "fp16", True),  # planes of more channels than a word has bits
        (2, Rotate("hadamard", size=64), 128, "bf16", True),  # blocks of several planes
        (4, Rotate("random_hadamard", size=16, seed=1), 64, "fp16", True),  # blocks within a plane
        (2, Rotate("random_hadamard", seed=2), 64, "bf16", True),
        (4, Rotate("hadamard", size=32), 96, "fp16", False),
        (4, Rotate("hadamard"), 64, "fp32", False),
    ],
)
def test_queries_and_outputs_are_rotated_where_pages_are_read(
    bits: int, rotate: Rotate, dim: int, dtype: Any, own: bool
) -> None:
    """By the programs that read them where planes are whole blocks, or blocks whole planes; else by kernels of their
    own, and in the merge."""
    scheme = Scheme(both=Store(Uniform(bits), scale=per_token(), transform=rotate))
    shape = Shape(dim, 2, 4, dtype=dtype)
    assert plan_for(scheme, shape).rotates is own
    for law in ("decode_is_attention", "extend_is_attention"):
        LAWS[law](Case(scheme, shape, "triton", batch=1, tokens=130, seed=6))


def test_a_word_has_the_signs_of_a_rotation() -> None:
    """With them on its channels a random rotation is the one without."""
    drawn, plain = (rotation(kind, 64, seed, 128) for kind, seed in (("random_hadamard", 7), ("hadamard", None)))
    words = sign_words(drawn[None].float(), 64, 3)
    assert words.shape == (3, 4) and words.dtype is torch.int32
    for row in words:
        negative = (row[:, None] >> torch.arange(32) & 1).flatten().bool()
        assert torch.equal(torch.where(negative, -drawn, drawn), plain)
