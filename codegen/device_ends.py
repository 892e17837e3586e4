"""What programs of attention end with: the sum of a row's weights, which is 1 at least, is divided by and becomes a
logarithm.

One instruction each, right to the last bits; those for all numbers take 9 and 22, and what a kernel's text takes to be
read is what short contexts wait for.
"""

import triton
import triton.language as tl

from .device import INTERPRETED

if INTERPRETED:

    @triton.jit
    def reciprocal(x):
        """1 / x, of numbers from 1 on."""
        return 1.0 / x

    @triton.jit
    def logarithm(x):
        """To base 2, of numbers from 1 on."""
        return tl.log2(x)

else:

    @triton.jit
    def reciprocal(x):
        """1 / x, of numbers from 1 on."""
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )

    @triton.jit
    def logarithm(x):
        """To base 2, of numbers from 1 on."""
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def higher_of_both(numbers):
    """Of [2 * rows] the higher of every row's two, in both places."""
    return _twice(tl.max(tl.reshape(numbers, (2, numbers.shape[0] // 2)), 0))


@triton.jit
def sum_of_both(numbers):
    """Of [2 * rows] the sum of every row's two, in both places."""
    return _twice(tl.sum(tl.reshape(numbers, (2, numbers.shape[0] // 2)), 0))


@triton.jit
def _twice(numbers):
    """[rows] as [2 * rows]."""
    both = tl.broadcast_to(numbers[None, :], (2, numbers.shape[0]))
    return tl.reshape(both, (2 * numbers.shape[0],))


@triton.jit
def above_each_other(upper, lower):
    """Two tiles [lanes, columns] as one [2 * lanes, columns]."""
    both = tl.permute(tl.join(upper, lower), (2, 0, 1))
    return tl.reshape(both, (2 * upper.shape[0], upper.shape[1]))


@triton.jit
def columns_of_both(columns):
    """Of [lanes, 2 * rows] the sum of every row's two, in both places.  Not a sum along an axis, which two threads have
    then and both write where the warp exchanges what it stores: the same number, but a race."""
    shape: tl.constexpr = (columns.shape[0], 2, columns.shape[1] // 2)
    left, right = tl.split(tl.permute(tl.reshape(columns, shape), (0, 2, 1)))
    rows = left + right
    return tl.reshape(tl.permute(tl.join(rows, rows), (0, 2, 1)), columns.shape)


@triton.jit
def with_mapped(total, coded, matrix):
    """total [rows, channels] and the product of coded numbers [rows, numbers] with those of a matrix [channels,
    numbers], float32: by tensor cores where there are as many rows as these multiply at once, each number as a sum of
    such as they take."""
    if coded.shape[0] < 16:
        return total + tl.sum(matrix[None, :, :] * coded[:, None, :], 2)
    return tl.dot(coded, tl.trans(matrix), total, input_precision="tf32x3")
