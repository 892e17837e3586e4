"""What every generated kernel shares: bit-level pieces of Triton that no scheme changes.

Inline assembly has no meaning in Triton's interpreter, so the pieces that use it exist twice, chosen once at import by
TRITON_INTERPRET; both forms give the same bits.
"""

import os

import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

if INTERPRETED:

    @triton.jit
    def upper(words):
        """The upper byte of each 16-bit word, zero-extended."""
        return (words >> 8) & 255

    @triton.jit
    def plane(words, MASK: tl.constexpr):
        """The bits under MASK of each 16-bit word as a float16: that integer times 2**-24, exactly."""
        return (words & MASK).to(tl.float16, bitcast=True)

    @triton.jit
    def field(words, RIGHT: tl.constexpr, LEFT: tl.constexpr, MASK: tl.constexpr):
        """The bits under MASK of each 16-bit word, shifted first; MASK must leave out what a shift brings in."""
        return ((words >> RIGHT) << LEFT) & MASK

    @triton.jit
    def both(words, others):
        """The bits of two fields together."""
        return words | others

    @triton.jit
    def with_nan(halves):
        """e4m3 numbers moved into float16 bits, the one that stands for NaN made one."""
        return halves | (((halves & 0x3F80) + 128) & 0x4000)

    @triton.jit
    def table4(codes, A: tl.constexpr, B: tl.constexpr):
        """16-bit entries of a table of four: A the low bytes, B the high ones."""
        found = codes * 0
        for i in tl.static_range(4):
            found = tl.where(codes == i, ((A >> (8 * i)) & 255) | (((B >> (8 * i)) & 255) << 8), found)
        return found.to(tl.int16)

    @triton.jit
    def table8(codes, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr):
        """16-bit entries of a table of eight: A, B the low bytes, C, D the high ones."""
        return tl.where(codes < 4, table4(codes, A, C), table4(codes - 4, B, D))

    @triton.jit
    def table16(
        codes, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
        E: tl.constexpr, F: tl.constexpr, G: tl.constexpr, H: tl.constexpr,
    ):  # fmt: skip
        """16-bit entries of a table of sixteen: A to D the low bytes, E to H the high ones."""
        return tl.where(codes < 8, table8(codes, A, B, E, F), table8(codes - 8, C, D, G, H))

    @triton.jit
    def quotient(dividend, divisor):
        """dividend / divisor, rounded to nearest; the divisor a positive or negative float16 widened to float32."""
        return tl.div_rn(dividend, tl.broadcast_to(divisor, dividend.shape))

else:

    @triton.jit
    def upper(words):
        """The upper byte of each 16-bit word, zero-extended."""
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, 0, 0x4341;", "=r,r", [words], dtype=tl.int16, is_pure=True, pack=2
        )

    @triton.jit
    def plane(words, MASK: tl.constexpr):
        """The bits under MASK of each 16-bit word as a float16: that integer times 2**-24, exactly."""
        mask = tl.full(words.shape, MASK, tl.int16)
        kept = tl.inline_asm_elementwise(
            "and.b32 $0, $1, $2;", "=r,r,r", [words, mask], dtype=tl.int16, is_pure=True, pack=2
        )
        return kept.to(tl.float16, bitcast=True)

    @triton.jit
    def field(words, RIGHT: tl.constexpr, LEFT: tl.constexpr, MASK: tl.constexpr):
        """The bits under MASK of each 16-bit word, shifted first; MASK must leave out what a shift brings in."""
        mask = tl.full(words.shape, MASK, tl.int16)
        if RIGHT:
            shift = tl.full(words.shape, RIGHT, tl.int32)
            return tl.inline_asm_elementwise(
                "{ .reg .b32 t; shr.u32 t, $1, $2; and.b32 $0, t, $4; }",
                "=r,r,r,r,r", [words, shift, mask], dtype=tl.int16, is_pure=True, pack=2,
            )  # fmt: skip
        shift = tl.full(words.shape, LEFT, tl.int32)
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; shl.b32 t, $1, $2; and.b32 $0, t, $4; }",
            "=r,r,r,r,r", [words, shift, mask], dtype=tl.int16, is_pure=True, pack=2,
        )  # fmt: skip

    @triton.jit
    def both(words, others):
        """The bits of two fields together."""
        return tl.inline_asm_elementwise(
            "or.b32 $0, $1, $2;", "=r,r,r", [words, others], dtype=tl.int16, is_pure=True, pack=2
        )

    @triton.jit
    def with_nan(halves):
        """e4m3 numbers moved into float16 bits, the one that stands for NaN made one."""
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; and.b32 t, $1, 0x3F803F80; add.u32 t, t, 0x00800080; and.b32 t, t, 0x40004000; "
            "or.b32 $0, $1, t; }",
            "=r,r", [halves], dtype=tl.int16, is_pure=True, pack=2,
        )  # fmt: skip

    @triton.jit
    def table4(codes, A: tl.constexpr, B: tl.constexpr):
        """16-bit entries of a table of four: A the low bytes, B the high ones.

        Two codes of a register become four selectors of a byte each: c, c + 4 of either.
        """
        low, high = tl.full(codes.shape, A, tl.int32), tl.full(codes.shape, B, tl.int32)
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; shr.u32 t, $1, 8; or.b32 t, t, $1; mad.lo.u32 t, t, 17, 0x4040; prmt.b32 $0, $2, $4, t; }",
            "=r,r,r,r,r,r", [codes, low, high], dtype=tl.int16, is_pure=True, pack=2,
        )  # fmt: skip

    @triton.jit
    def table8(codes, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr):
        """16-bit entries of a table of eight: A, B the low bytes, C, D the high ones.

        The codes of a register, side by side, select two low bytes and two high ones, which are interleaved.
        """
        a, b = tl.full(codes.shape, A, tl.int32), tl.full(codes.shape, B, tl.int32)
        c, d = tl.full(codes.shape, C, tl.int32), tl.full(codes.shape, D, tl.int32)
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t, low, high; shr.u32 t, $1, 12; or.b32 t, t, $1; prmt.b32 low, $2, $4, t; "
            "prmt.b32 high, $6, $8, t; prmt.b32 $0, low, high, 0x5140; }",
            "=r,r,r,r,r,r,r,r,r,r", [codes, a, b, c, d], dtype=tl.int16, is_pure=True, pack=2,
        )  # fmt: skip

    @triton.jit
    def table16(
        codes, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
        E: tl.constexpr, F: tl.constexpr, G: tl.constexpr, H: tl.constexpr,
    ):  # fmt: skip
        """16-bit entries of a table of sixteen: A to D the low bytes, E to H the high ones.

        Either half of the table is looked up by the code's low three bits; its top bit selects among what was found.
        """
        a, b = tl.full(codes.shape, A, tl.int32), tl.full(codes.shape, B, tl.int32)
        c, d = tl.full(codes.shape, C, tl.int32), tl.full(codes.shape, D, tl.int32)
        e, f = tl.full(codes.shape, E, tl.int32), tl.full(codes.shape, F, tl.int32)
        g, h = tl.full(codes.shape, G, tl.int32), tl.full(codes.shape, H, tl.int32)
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t, s, x, y, low, high; shr.u32 t, $1, 12; or.b32 t, t, $1; shr.u32 s, t, 1; "
            "and.b32 s, s, 0x44; or.b32 s, s, 0x10; and.b32 t, t, 0x77; "
            "prmt.b32 x, $2, $4, t; prmt.b32 y, $6, $8, t; prmt.b32 low, x, y, s; "
            "prmt.b32 x, $10, $12, t; prmt.b32 y, $14, $16, t; prmt.b32 high, x, y, s; "
            "prmt.b32 $0, low, high, 0x5140; }",
            "=r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r", [codes, a, b, c, d, e, f, g, h],
            dtype=tl.int16, is_pure=True, pack=2,
        )  # fmt: skip

    @triton.jit
    def quotient(dividend, divisor):
        """dividend / divisor, rounded to nearest; the divisor a positive or negative float16 widened to float32.

        One correction of an approximate quotient leaves a relative error near 2**-44; a quotient by a divisor of 11
        significant bits lies at least 2**-36 away from the middle of two float32 numbers, so the rounding is the exact
        one.
        """
        inverse = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [divisor], dtype=tl.float32, is_pure=True, pack=1
        )
        inverse = tl.broadcast_to(inverse, dividend.shape)
        first = dividend * inverse
        return tl.fma(tl.fma(-first, tl.broadcast_to(divisor, dividend.shape), dividend), inverse, first)


@triton.jit
def exact_quotient(dividend, divisor):
    """dividend / divisor, rounded to nearest, of any float32 numbers."""
    return tl.div_rn(dividend, tl.broadcast_to(divisor, dividend.shape))


@triton.jit
def over(dividend, DIVISOR: tl.constexpr):
    """dividend / DIVISOR, rounded to nearest."""
    return tl.div_rn(dividend, tl.full(dividend.shape, DIVISOR, tl.float32))


@triton.jit
def as_int(x):
    """A float32's bits."""
    return x.to(tl.int32, bitcast=True)


@triton.jit
def as_float(words):
    """32-bit words read as float32."""
    return words.to(tl.float32, bitcast=True)


@triton.jit
def to_int(x):
    """Whole numbers as int32."""
    return x.to(tl.int32)


@triton.jit
def to_int16(words):
    """The low 16 bits of 32-bit words."""
    return words.to(tl.int16)


@triton.jit
def to_byte(words):
    """The low byte of 32-bit words."""
    return words.to(tl.uint8)


@triton.jit
def e4m3(words):
    """Bytes read as e4m3, as float32."""
    words = words.to(tl.int32) & 255
    number = half((((words & 127) << 7) | ((words & 128) << 8)).to(tl.int16)) * 256.0
    return tl.where((words & 127) == 127, float("nan"), number)


@triton.jit
def high_e4m3(words):
    """The high bytes of 16-bit words read as e4m3, as float32."""
    return e4m3(words >> 8)


@triton.jit
def e5m2(words):
    """Bytes read as e5m2, as float32."""
    return half((words.to(tl.int32) << 8).to(tl.int16))


@triton.jit
def e2m1(words):
    """Nibbles read as e2m1, as float32."""
    words = words.to(tl.int32)
    return half((((words & 7) << 9) | ((words & 8) << 12)).to(tl.int16)) * 16384.0


@triton.jit
def e8m0(words):
    """Bytes read as the power of two whose exponent they are, as float32; 255 is NaN."""
    words = words.to(tl.int32) & 255
    return ((words << 23) | tl.where(words == 255, 0x400000, 0)).to(tl.float32, bitcast=True)


@triton.jit
def low_half(words):
    """The low 16 bits of each 32-bit word, read as float16, as float32."""
    return (words & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def high_half(words):
    """The high 16 bits of each 32-bit word, read as float16, as float32."""
    return (words >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def low_half_bf16(words):
    """The low 16 bits of each 32-bit word, read as bfloat16, as float32."""
    return (words << 16).to(tl.float32, bitcast=True)


@triton.jit
def high_half_bf16(words):
    """The high 16 bits of each 32-bit word, read as bfloat16, as float32."""
    return (words & -65536).to(tl.float32, bitcast=True)


@triton.jit
def half(words):
    """16-bit words read as float16, as float32."""
    return words.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def half_bf16(words):
    """16-bit words read as bfloat16, as float32."""
    return (words.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def scale_over_zero_point(words, MASK: tl.constexpr):
    """The float32 whose lowest mantissa bits, under MASK, hold a zero point: those bits cleared."""
    return (words & ~MASK).to(tl.float32, bitcast=True)


@triton.jit
def bits_fp16(x):
    """The nearest float16's bits, as int32; x within its range.  A zero has no sign."""
    word = x.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return tl.where(word == 0x8000, 0, word)


@triton.jit
def bits_bf16(x):
    """The nearest bfloat16's bits (ties to even), as int32; NaN stays NaN.  A zero has no sign."""
    word = x.to(tl.int32, bitcast=True)
    rounded = ((word + 0x7FFF + ((word >> 16) & 1)) >> 16) & 0xFFFF
    rounded = tl.where(rounded == 0x8000, 0, rounded)
    return tl.where(x == x, rounded, 0x7FC0)


@triton.jit
def bits_fp32(x):
    """A float32's bits.  A zero has no sign."""
    return tl.where(x == 0.0, 0, x.to(tl.int32, bitcast=True))


@triton.jit
def nearest(x):
    """Round to the nearest integer, ties to even; |x| < 2**22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def nearest_half_up(x):
    """Round to the nearest integer, ties up; |x| < 2**22."""
    even = (x + 12582912.0) - 12582912.0
    return even + tl.where(x - even == 0.5, 1.0, 0.0)


@triton.jit
def nearest_away(x):
    """Round to the nearest integer, ties away from zero; |x| < 2**22."""
    size = tl.floor(tl.abs(x))
    size = size + tl.where(tl.abs(x) - size >= 0.5, 1.0, 0.0)
    return tl.where(x < 0.0, -size, size)


@triton.jit
def root(x):
    """The square root, rounded to nearest."""
    return tl.sqrt_rn(x)


@triton.jit
def wide(x):
    """As float64."""
    return x.to(tl.float64)


@triton.jit
def narrow(x):
    """float64 rounded to float32."""
    return x.to(tl.float32)


@triton.jit
def to_float(x):
    """Whole numbers as float32."""
    return x.to(tl.float32)


@triton.jit
def small_float(x, MANTISSA: tl.constexpr, LEAST: tl.constexpr, TOP: tl.constexpr, SIGN: tl.constexpr):
    """The bits of the nearest small float (ties to even), saturating at TOP; a zero has no sign.

    Numbers from 2**LEAST on have MANTISSA bits behind the first; smaller ones are spaced as those just above.
    """
    size = tl.minimum(tl.abs(x), TOP)
    exponent = tl.maximum(((size.to(tl.int32, bitcast=True) >> 23) & 255) - 127, LEAST)
    steps = nearest(size * ((127 + MANTISSA - exponent) << 23).to(tl.float32, bitcast=True))
    code = ((exponent - LEAST) << MANTISSA) + steps.to(tl.int32)
    return tl.where((x < 0.0) & (code > 0), code + SIGN, code)


@triton.jit
def bits_e4m3(x):
    """The nearest e4m3's bits, saturating.  A zero has no sign."""
    return small_float(x, 3, -6, 448.0, 128)


@triton.jit
def power_of_two(size, LESS: tl.constexpr):
    """2**(floor(log2(size)) - LESS) within what 8 bits of exponent hold."""
    exponent = ((size.to(tl.int32, bitcast=True) >> 23) & 255) - 127
    exponent = tl.where(exponent < -126, -126, exponent - LESS)
    return ((tl.minimum(tl.maximum(exponent, -126), 127) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def power_bits(scale):
    """The exponent's bits of a power of two."""
    return (scale.to(tl.int32, bitcast=True) >> 23) & 255


@triton.jit
def finite(x):
    """NaN to 0, and everything into the range of float16."""
    return tl.minimum(tl.maximum(tl.where(x == x, x, 0.0), -65504.0), 65504.0)


@triton.jit
def lowest(x, inside):
    """x made finite, or more than anything where it does not count."""
    return tl.where(inside, finite(x), 65504.0)


@triton.jit
def highest(x, inside):
    """x made finite, or less than anything where it does not count."""
    return tl.where(inside, finite(x), -65504.0)


@triton.jit
def nan(x):
    """1 where x is not a number."""
    return (x != x).to(tl.int32)


@triton.jit
def spoil(x, spoilt):
    """x, or NaN where spoilt is not 0."""
    return tl.where(spoilt != 0, float("nan"), x)


@triton.jit
def square(x):
    """Squares of numbers made finite, float64."""
    number = finite(x).to(tl.float64)
    return number * number


@triton.jit
def magnitude(x):
    """Sizes of numbers made finite, float64."""
    return tl.abs(finite(x).to(tl.float64))


@triton.jit
def above(top):
    """A power of two at least twice as large as `top` (positive, or NaN), and its inverse."""
    exponent = (top.to(tl.int32, bitcast=True) >> 23) & 255
    exponent = tl.minimum(tl.maximum(exponent, 8), 240) + 2
    size = (exponent << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    return size, inverse


@triton.jit
def tanh(x):
    """Hyperbolic tangent."""
    decay = tl.exp2(tl.abs(x) * -2.8853900817779268)
    size = (1.0 - decay) / (1.0 + decay)
    return tl.where(x < 0.0, -size, size)
