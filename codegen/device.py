"""What every generated kernel shares: bit-level pieces of Triton that no scheme changes.

Inline assembly has no meaning in Triton's interpreter, so the pieces that use it exist twice, chosen once at import by
TRITON_INTERPRET; both forms give the same bits.
"""

import triton
import triton.language as tl

from kvdsl.interpreting import interpreted

INTERPRETED = interpreted()

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
    def finite_halves(x):
        """NaN to 0, and infinities to the largest float16 numbers."""
        return tl.minimum(tl.maximum(tl.where(x == x, x, 0.0), -65504.0), 65504.0).to(tl.float16)

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
    def finite_halves(x):
        """NaN to 0, and infinities to the largest float16 numbers."""
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t, m; set.eq.u32.f16x2 m, $1, $1; and.b32 t, $1, m; mov.b32 m, 0xFBFFFBFF; "
            "max.f16x2 t, t, m; mov.b32 m, 0x7BFF7BFF; min.f16x2 $0, t, m; }",
            "=r,r", [x], dtype=tl.float16, is_pure=True, pack=2,
        )  # fmt: skip


@triton.jit
def exact_quotient(dividend, divisor):
    """dividend / divisor, rounded to nearest, of any float32 numbers."""
    return tl.div_rn(dividend, tl.broadcast_to(divisor, dividend.shape))


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
def hadamard(x, STAGES: tl.constexpr, FACTOR: tl.constexpr):
    """FACTOR times Sylvester's matrix of 2**STAGES rows times every block of so many numbers of rows.

    A stage takes neighbours a, b to a + b, which goes to the first half, and a - b, which goes to the second: the
    lowest bit of a place becomes its highest, and after all stages stands where it was.  A zero has no sign.
    """
    blocks: tl.constexpr = x.shape[0] * x.shape[1] >> STAGES
    y = tl.reshape(x, [blocks, 1 << STAGES])
    for _ in tl.static_range(STAGES):
        a, b = tl.split(tl.reshape(y, [blocks, 1 << STAGES - 1, 2]))
        y = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), [blocks, 1 << STAGES])
    y = tl.reshape(y, x.shape)
    return tl.fma(y, tl.full(y.shape, FACTOR, x.dtype), tl.zeros(y.shape, x.dtype))


@triton.jit
def hadamard_lanes(x, SIZE: tl.constexpr):
    """Sylvester's matrix of SIZE rows times every block of so many lanes of x [lanes, rows], as float32.

    Products of a sign and a float16 number, or a bfloat16 number as float32, are exact, as matrix units multiply them.
    """
    i = tl.arange(0, x.shape[0])
    both = i[:, None] & i[None, :]
    if x.shape[0] > 32:
        both = (both ^ (both >> 5)) & 31  # as many of its bits are set, or an even number fewer
    odd = ((-1771476586 >> both) & 1) > 0  # a bit for each number below 32: whether an odd number of its bits is set
    matrix = tl.where(odd, -1.0, 1.0)
    if x.shape[0] > SIZE:
        matrix = tl.where(i[:, None] // SIZE == i[None, :] // SIZE, matrix, 0.0)
    return tl.dot(matrix.to(x.dtype), x, input_precision="tf32")


@triton.jit
def with_signs(x, bits, lane):
    """x [lanes, rows], negative where the bit of a lane is set."""
    return tl.where(((bits >> lane) & 1)[:, None] > 0, -x, x)


@triton.jit
def finite(x):
    """NaN to 0, and everything into the range of float16; as float32."""
    if x.dtype == tl.float16:
        x = finite_halves(x).to(tl.float32)
    else:
        x = x.to(tl.float32)
        x = tl.minimum(tl.maximum(tl.where(x == x, x, 0.0), -65504.0), 65504.0)
    return x


@triton.jit
def lowest(x, inside):
    """x made finite, or more than anything where it does not count."""
    return tl.where(inside, finite(x), 65504.0)


@triton.jit
def highest(x, inside):
    """x made finite, or less than anything where it does not count."""
    return tl.where(inside, finite(x), -65504.0)


@triton.jit
def top_of(x):
    """The size of x made finite."""
    return tl.abs(finite(x))


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
def without(x, unit):
    """What is left of a vector beside another one, of length 1 or 0."""
    return x - unit * tl.sum(unit * x, 0)


@triton.jit
def unit(x, whole):
    """A float64 vector over its length; 0 where its square is no more than 2**-60 of `whole`."""
    square = tl.sum(x * x, 0)
    there = square > whole * 8.673617379884035e-19
    return tl.where(there, x / tl.sqrt(tl.where(there, square, 1.0)), 0.0)


@triton.jit
def cartesian(radius, angle):
    """(radius cos(angle), radius sin(angle)), each within 2**-22 of the radius, of angles up to 2**10.

    The angle is taken to the nearest quarter turn, whose count stands in the last bits of a number near 1.5 * 2**23; a
    quarter turn is two numbers, the first of so few bits that its products are exact.  The polynomials are those of
    Cephes for a rest of an eighth of a turn.
    """
    shifted = angle * 0.6366197723675814 + 12582912.0
    quarter = shifted.to(tl.int32, bitcast=True)
    turns = shifted - 12582912.0
    rest = angle - turns * 1.5703125
    rest = rest - turns * 4.838267948966192e-4
    square = rest * rest
    sine = 8.3321608736e-3 - square * 1.9515295891e-4
    sine = rest + rest * square * (square * sine - 1.6666654611e-1)
    cosine = square * 2.443315711809948e-5 - 1.388731625493765e-3
    cosine = square * (square * (square * cosine + 4.166664568298827e-2) - 0.5) + 1.0
    odd = (quarter & 1) != 0
    word = radius.to(tl.int32, bitcast=True)
    first = (word ^ (((quarter + 1) & 2) << 30)).to(tl.float32, bitcast=True) * tl.where(odd, sine, cosine)
    second = (word ^ ((quarter & 2) << 30)).to(tl.float32, bitcast=True) * tl.where(odd, cosine, sine)
    return first, second


@triton.jit
def tanh(x):
    """Hyperbolic tangent."""
    decay = tl.exp2(tl.abs(x) * -2.8853900817779268)
    size = (1.0 - decay) / (1.0 + decay)
    return tl.where(x < 0.0, -size, size)


@triton.jit
def over_columns(numbers, COUNT: tl.constexpr):
    """Every number of [rows, n] COUNT times side by side: [rows, n * COUNT]."""
    wide = tl.broadcast_to(numbers[:, :, None], [numbers.shape[0], numbers.shape[1], COUNT])
    return tl.reshape(wide, [numbers.shape[0], numbers.shape[1] * COUNT])


@triton.jit
def over_rows(numbers, COUNT: tl.constexpr):
    """Every number of [n, columns] COUNT times one below the other: [n * COUNT, columns]."""
    tall = tl.broadcast_to(numbers[:, None, :], [numbers.shape[0], COUNT, numbers.shape[1]])
    return tl.reshape(tall, [numbers.shape[0] * COUNT, numbers.shape[1]])


@triton.jit
def halves(numbers):
    """The first and the second half of [n]: two of [n / 2]."""
    return tl.split(tl.trans(tl.reshape(numbers, (2, numbers.shape[0] // 2))))


@triton.jit
def product(codes, queries, so_far=None):
    """codes [tokens, lanes] times queries [lanes, rows], float16, added to the sum so far, float32.

    For queries that were made in the loop: a lane of the GPU has made those of neighbouring channels, and a product
    asks it for others.  A sum does not mind the order, so both are given in the one in which each lane has its own."""
    STEPS: tl.constexpr = codes.shape[1] // 16
    codes = tl.reshape(tl.permute(tl.reshape(codes, (codes.shape[0], 4, STEPS, 2, 2)), (0, 2, 3, 1, 4)), codes.shape)
    queries = tl.reshape(
        tl.permute(tl.reshape(queries, (4, STEPS, 2, 2, queries.shape[1])), (1, 2, 0, 3, 4)), queries.shape
    )
    return tl.dot(codes, queries, so_far)


@triton.jit
def times_map(x, matrix):
    """x [rows, channels] times a matrix [channels, lanes], float32, of numbers x that float16 or bfloat16 hold.

    Tensor cores take 11 bits of a float32 number: all of such a one, and a number of the matrix is the sum of two."""
    upper = as_float(as_int(matrix) & -8192)
    return tl.dot(x, upper, tl.dot(x, matrix - upper, input_precision="tf32"), input_precision="tf32")
