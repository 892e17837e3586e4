"""What pack kernels share: numbers over a scale, rounded as the definition says, and the whole numbers nearest to them.

As in device.py, what is inline assembly for the compiler exists a second time for the interpreter, with the same bits.
Division as the compiler knows it takes a branch and a slow path for each number.  Here the inverse is taken once a
scale, and one correction of the product with it is the exact quotient, see `in_steps`.
"""

import triton
import triton.language as tl

from .device import INTERPRETED

if INTERPRETED:

    @triton.jit
    def in_steps(x, scale, FINE: tl.constexpr, FREE: tl.constexpr):
        """x / scale, rounded to nearest; 0 where the scale is 0."""
        y = tl.div_rn(x, tl.broadcast_to(tl.where(scale == 0.0, 1.0, scale), x.shape))
        return tl.where(scale == 0.0, 0.0, y)

    @triton.jit
    def in_half_steps(x, scale):
        """The same of a scale that is a float16 widened to float32."""
        return in_steps(x, scale, False, False)

    @triton.jit
    def over(dividend, DIVISOR: tl.constexpr):
        """dividend / DIVISOR, rounded to nearest."""
        return tl.div_rn(dividend, tl.full(dividend.shape, DIVISOR, tl.float32))

    @triton.jit
    def larger(x, other):
        """The larger of two numbers; NaN where either is."""
        return tl.where(x != x, x, tl.where(other != other, other, tl.maximum(x, other)))

    @triton.jit
    def largest(x, AXIS: tl.constexpr):
        """The largest number along an axis; NaN where any is."""
        return tl.where(tl.max((x != x).to(tl.int32), AXIS) > 0, float("nan"), tl.max(x, AXIS))

else:

    @triton.jit
    def near_inverse(scale):
        """1 / scale, one unit in the last place off at most; 0 where the scale is 0."""
        inverse = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [scale], dtype=tl.float32, is_pure=True, pack=1
        )
        return tl.where(scale == 0.0, 0.0, inverse)

    @triton.jit
    def corrected(x, scale, inverse, first):
        """The quotient of x and the scale from one near it: what that leaves of x, exact, goes onto it."""
        scale, inverse = tl.broadcast_to(-scale, x.shape), tl.broadcast_to(inverse, x.shape)
        return tl.fma(tl.fma(first, scale, x), inverse, first)

    @triton.jit
    def in_steps(x, scale, FINE: tl.constexpr, FREE: tl.constexpr):
        """x / scale, rounded to nearest; 0 where the scale is 0.

        FINE: scales may be smaller than those of float16 numbers; FREE: x may be any number of steps, not some hundreds
        at most.

        The inverse is corrected once, as in the machine's own division, which makes it the nearest one.  Then the
        quotient's correction has so small an error beside its distance from the middle of two float32 numbers that it
        could be rounded wrongly only where X * 2**k and M * S, of significands X, S of 24 bits and M of 25, differ by 3
        or less.  There are some ten million such pairs, and all were tried: none is.  This holds while nothing
        underflows: small scales and their x are lifted by a power of two, and quotients below 2**-100, which may be a
        unit off, are nearest to 0 in every alphabet.
        """
        if FINE:
            lift = tl.where(tl.abs(scale) < 8.673617379884035e-19, 1.2379400392853803e27, 1.0)  # 2**-60, 2**90
            x, scale = x * lift, scale * lift
        inverse = near_inverse(scale)
        inverse = tl.fma(tl.fma(inverse, -scale, tl.full(scale.shape, 1.0, tl.float32)), inverse, inverse)
        first = x * inverse
        if FREE:  # or it may be infinite, and nothing could be taken from it
            first = tl.clamp(first, -1.152921504606847e18, 1.152921504606847e18)
        return corrected(x, scale, inverse, first)

    @triton.jit
    def in_half_steps(x, scale):
        """The same of a scale that is a float16 widened to float32.

        One correction of an approximate quotient leaves a relative error near 2**-44; a quotient by a divisor of 11
        significant bits lies at least 2**-36 away from the middle of two float32 numbers, so the rounding is the exact
        one, though the inverse is not.
        """
        inverse = near_inverse(scale)
        return corrected(x, scale, inverse, x * inverse)

    @triton.jit
    def over(dividend, DIVISOR: tl.constexpr):
        """dividend / DIVISOR, rounded to nearest.

        Of an odd whole number n up to 4095 by one correction: with u the last place of the first quotient, what is left
        is a whole number of u, so that the exact quotient is at least u / 4n away from every middle, and the error of
        the correction is below 2**-22 u; subnormal quotients are no exception.
        """
        if DIVISOR % 2.0 == 1.0 and DIVISOR < 4096.0:
            divisor = tl.full(dividend.shape, DIVISOR, tl.float32)
            inverse = tl.full(dividend.shape, 1.0 / DIVISOR, tl.float32)
            result = corrected(dividend, divisor, inverse, dividend * inverse)
        else:
            result = tl.div_rn(dividend, tl.full(dividend.shape, DIVISOR, tl.float32))
        return result

    @triton.jit
    def larger(x, other):
        """The larger of two numbers; NaN where either is."""
        return tl.maximum(x, other, propagate_nan=tl.PropagateNan.ALL)

    @triton.jit
    def largest(x, AXIS: tl.constexpr):
        """The largest number along an axis; NaN where any is."""
        return tl.reduce(x, AXIS, larger)


@triton.jit
def above_infinity(x):
    """More than 0 where x is not a number, int32, so that the largest of several says whether any is none."""
    return (x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF) - 0x7F800000


@triton.jit
def odd(tops):
    """Whether any of some largest numbers is NaN, or beyond the range of float16."""
    return tl.max((~(tops <= 65504.0)).to(tl.int32), 0) != 0


@triton.jit
def within(codes, LAST: tl.constexpr):
    """Whole numbers brought among the codes 0 to LAST."""
    return tl.minimum(tl.maximum(codes, 0), LAST)


@triton.jit
def nearest_code(x):
    """The nearest integer, ties to even, as int32; |x| < 2**22.  It stands in the last bits of a number near 2**23."""
    return (x + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def to_float(x):
    """Whole numbers of less than 2**22 in size as float32.

    Not converted: compilers move the sum behind a conversion into pairs of 16-bit integers, of which NVIDIA's assembler
    then forgets to add to one (12.8, sm_90: the scales of ternary codes at head_dim 64).
    """
    return (x.to(tl.int32) + 0x4B400000).to(tl.float32, bitcast=True) - 12582912.0
