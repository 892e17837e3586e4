"""Operands of products as Triton's text of a kernel gives them: none that is less deep than what a lane takes of it."""

from __future__ import annotations

import pytest

from kvdsl.codegen.operands import misread

LEFT = "tensor<16x{0}xf16, #ttg.dot_op<{{opIdx = 0, parent = #mma, kWidth = {1}}}>>"
RIGHT = "tensor<{0}x8xf16, #ttg.dot_op<{{opIdx = 1, parent = #mma1, kWidth = {1}}}>>"


@pytest.mark.parametrize("side", [LEFT, RIGHT])
def test_a_product_less_deep_than_its_lanes_take_is_told(side: str) -> None:
    fault = misread(f"%0 = tt.dot %1, %2 : {side.format(16, 8)}")
    assert fault == "Triton takes 32 numbers of each row of a f16 product of 16, so its sums are wrong"


@pytest.mark.parametrize("side", [LEFT, RIGHT])
@pytest.mark.parametrize(("depth", "width"), [(16, 2), (16, 4), (32, 8), (1, 2)])
def test_others_are_not(side: str, depth: int, width: int) -> None:
    """Of 1 are numbers that are yet to be spread over columns."""
    assert misread(f"%0 = tt.dot %1, %2 : {side.format(depth, width)}") is None
