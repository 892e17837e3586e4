"""What generated kernels share of looked-up codes: fields of words, tables of sixteen entries at most, small floats.

As in device.py, what is inline assembly for the compiler exists a second time for the interpreter, with the same bits.
"""

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

from .device import INTERPRETED, half
from .device_steps import nearest_code

if INTERPRETED:

    @triton.jit
    def field(words, RIGHT: tl.constexpr, LEFT: tl.constexpr, MASK: tl.constexpr):
        """The bits under MASK of each 16-bit word, shifted first; MASK must leave out what a shift brings in."""
        return ((words >> RIGHT) << LEFT) & MASK

    @triton.jit
    def lower(words):
        """The lower byte of each 16-bit word, zero-extended."""
        return words & 255

    @triton.jit
    def thrice(words):
        """Three times a byte in each 16-bit word: the next ternary digit above what is left."""
        return words * 3

    @triton.jit
    def both(words, others):
        """The bits of two fields together."""
        return words | others

    @triton.jit
    def common(words, others):
        """The bits that two 16-bit fields have in common."""
        return words & others

    @triton.jit
    def e4m3_halves(words, HIGH: tl.constexpr, NAN: tl.constexpr):
        """The lower, or the HIGH, byte of each 16-bit word read as e4m3, as float16; NAN: it may be one."""
        if HIGH:
            words = words >> 8
        halves = ((words & 127) << 7) | ((words & 128) << 8)
        if NAN:
            halves = halves | (((halves & 0x3F80) + 128) & 0x4000)
        return halves.to(tl.int16).to(tl.float16, bitcast=True) * 256.0

    @triton.jit
    def entry(codes, LOW, HIGH):
        """Byte `codes` of LOW, and that of HIGH above it, of registers of four bytes."""
        shift = codes.to(tl.int32) * 8
        return ((LOW >> shift) & 255) | (((HIGH >> shift) & 255) << 8)

    @triton.jit
    def table4(words, PLACE: tl.constexpr, A, B, ALONE: tl.constexpr = False):
        """16-bit entries of a table of four for codes PLACE of 16-bit words: A the low bytes, B the high ones."""
        return entry((words >> (2 * PLACE)) & 3, A, B).to(tl.int16)

    @triton.jit
    def table8(words, lowest, PLACE: tl.constexpr, A, B, C, D, ALONE: tl.constexpr = False):
        """16-bit entries of a table of eight: A, B the low bytes, C, D the high ones.

        Code PLACE has its upper two bits in `words`, its lowest one in `lowest`: four in the low half of each byte.
        """
        upper = (words >> (2 * PLACE)) & 3
        code = (upper & 1) * 2 + ((lowest >> (PLACE + PLACE // 4 * 4)) & 1)
        return tl.where(upper < 2, entry(code, A, C), entry(code, B, D)).to(tl.int16)

    @triton.jit
    def table16(words, PLACE: tl.constexpr, A, B, C, D, E, F, G, H, ALONE: tl.constexpr = False):
        """16-bit entries of a table of sixteen for codes PLACE of 16-bit words: A to D the low bytes, E to H the high
        ones."""
        code = (words >> (4 * PLACE)) & 15
        lower = tl.where(code < 4, entry(code, A, E), entry(code - 4, B, F))
        upper = tl.where(code < 12, entry(code - 8, C, G), entry(code - 12, D, H))
        return tl.where(code < 8, lower, upper).to(tl.int16)

    @triton.jit
    def small_float(
        x, MANTISSA: tl.constexpr, LEAST: tl.constexpr, TOP: tl.constexpr, SIGN: tl.constexpr, TIES: tl.constexpr = 0
    ):
        """The bits of the nearest small float, see `small_float_by_bits`."""
        return small_float_by_bits(x, MANTISSA, LEAST, TOP, SIGN, TIES)

else:

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
    def lower(words):
        """The lower byte of each 16-bit word, zero-extended."""
        return tl.inline_asm_elementwise(
            "and.b32 $0, $1, 0x00FF00FF;", "=r,r", [words], dtype=tl.int16, is_pure=True, pack=2
        )

    @triton.jit
    def thrice(words):
        """Three times a byte in each 16-bit word: the next ternary digit above what is left."""
        return tl.inline_asm_elementwise("mul.lo.u32 $0, $1, 3;", "=r,r", [words], dtype=tl.int16, is_pure=True, pack=2)

    @triton.jit
    def both(words, others):
        """The bits of two fields together."""
        return tl.inline_asm_elementwise(
            "or.b32 $0, $1, $2;", "=r,r,r", [words, others], dtype=tl.int16, is_pure=True, pack=2
        )

    @triton.jit
    def common(words, others):
        """The bits that two 16-bit fields have in common."""
        return tl.inline_asm_elementwise(
            "and.b32 $0, $1, $2;", "=r,r,r", [words, others], dtype=tl.int16, is_pure=True, pack=2
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
    def e4m3_halves(words, HIGH: tl.constexpr, NAN: tl.constexpr):
        """The lower, or the HIGH, byte of each 16-bit word read as e4m3, as float16; NAN: it may be one."""
        if not cuda_capability_geq(8, 9):
            return e4m3_by_bits(words, HIGH, NAN)
        # the lower bytes of both words of a register go into its lower half, the high ones into the other
        if HIGH:
            halves = tl.inline_asm_elementwise(
                "{ .reg .b16 l, h; .reg .b32 t; prmt.b32 t, $1, 0, 0x3120; mov.b32 {l, h}, t; "
                "cvt.rn.f16x2.e4m3x2 $0, h; }",
                "=r,r", [words], dtype=tl.int16, is_pure=True, pack=2,
            )  # fmt: skip
        else:
            halves = tl.inline_asm_elementwise(
                "{ .reg .b16 l, h; .reg .b32 t; prmt.b32 t, $1, 0, 0x3120; mov.b32 {l, h}, t; "
                "cvt.rn.f16x2.e4m3x2 $0, l; }",
                "=r,r", [words], dtype=tl.int16, is_pure=True, pack=2,
            )  # fmt: skip
        return halves.to(tl.float16, bitcast=True)

    @triton.jit
    def eight_bits(x, MANTISSA: tl.constexpr):
        """The bits of the nearest e4m3, or e5m2 of two mantissa bits, as int32; saturating, for GPUs from sm_89 on."""
        if MANTISSA == 3:
            code = tl.inline_asm_elementwise(
                "{ .reg .b16 h; cvt.rn.satfinite.e4m3x2.f32 h, 0f00000000, $1; cvt.u32.u16 $0, h; }",
                "=r,f", [x], dtype=tl.int32, is_pure=True, pack=1,
            )  # fmt: skip
        else:
            code = tl.inline_asm_elementwise(
                "{ .reg .b16 h; cvt.rn.satfinite.e5m2x2.f32 h, 0f00000000, $1; cvt.u32.u16 $0, h; }",
                "=r,f", [x], dtype=tl.int32, is_pure=True, pack=1,
            )  # fmt: skip
        return code

    @triton.jit
    def small_float(
        x, MANTISSA: tl.constexpr, LEAST: tl.constexpr, TOP: tl.constexpr, SIGN: tl.constexpr, TIES: tl.constexpr = 0
    ):
        """The bits of the nearest small float, see `small_float_by_bits`."""
        if SIGN != 128 or TIES or not cuda_capability_geq(8, 9):
            return small_float_by_bits(x, MANTISSA, LEAST, TOP, SIGN, TIES)
        # half the smallest number and less are 0, and would keep their sign
        return eight_bits(tl.where(tl.abs(x) > 2.0 ** (LEAST - MANTISSA - 1), x, 0.0), MANTISSA)

    @triton.jit
    def e4m3_by_bits(words, HIGH: tl.constexpr, NAN: tl.constexpr):
        """The same on GPUs that do not convert them: bits moved to their places, and a power of two."""
        if HIGH:
            halves = both(field(words, 1, 0, 0x3F80), field(words, 0, 0, -32768))
        else:
            halves = both(field(words, 0, 7, 0x3F80), field(words, 0, 8, -32768))
        if NAN:
            halves = with_nan(halves)
        return halves.to(tl.float16, bitcast=True) * 256.0

    # Words are their own selectors: of a register with words x and y one byte of either is taken, of whose codes two of
    # x and two of y select at once.  NVIDIA's assembler leaves out a shift by 0, and does once what calls for other
    # places repeat.  All places of a word in one call were 0.5 instructions a pair less, and more registers than there
    # are.  Where a thread holds one word, the other is undefined: no bit of it may reach the first one's selectors.
    # If ALONE, nothing is shared with the other place of a call, whose entries would wait in registers: the zeros above
    # the byte are taken from elsewhere, so that the calls differ.

    @triton.jit
    def table4(words, PLACE: tl.constexpr, A, B, ALONE: tl.constexpr = False):
        """16-bit entries of a table of four for codes PLACE of 16-bit words: A the low bytes, B the high ones."""
        zeros = 0x5500 if ALONE and PLACE % 4 // 2 else 0x4400
        byte = tl.full(words.shape, zeros + (0x31 if PLACE > 3 else 0x20), tl.int32)
        odd = tl.full(words.shape, PLACE % 2 * 2, tl.int32)
        a, b = tl.full(words.shape, A, tl.int32), tl.full(words.shape, B, tl.int32)
        return tl.inline_asm_elementwise(
            "{ .reg .b32 s, low, high; prmt.b32 s, $2, 0, $3; shr.u32 s, s, $5; and.b32 s, s, 0x3333; "
            "prmt.b32 low, $7, $7, s; prmt.b32 high, $9, $9, s; "
            "prmt.b32 $0, low, high, 0x6240; prmt.b32 $1, low, high, 0x7351; }",
            "=r,=r,r,r,r,r,r,r,r,r,r", [words, byte, odd, a, b], dtype=(tl.int16,) * 2, is_pure=True, pack=2,
        )[PLACE % 4 // 2]  # fmt: skip

    @triton.jit
    def table8(words, lowest, PLACE: tl.constexpr, A, B, C, D, ALONE: tl.constexpr = False):
        """16-bit entries of a table of eight: A, B the low bytes, C, D the high ones.

        Code PLACE has its upper two bits in `words`, its lowest one in `lowest`: four in the low half of each byte.
        """
        zeros = 0x5500 if ALONE and PLACE % 4 // 2 else 0x4400
        byte = tl.full(words.shape, zeros + (0x31 if PLACE > 3 else 0x20), tl.int32)
        odd, even = tl.full(words.shape, PLACE % 2, tl.int32), tl.full(words.shape, 1 - PLACE % 2, tl.int32)
        a, b = tl.full(words.shape, A, tl.int32), tl.full(words.shape, B, tl.int32)
        c, d = tl.full(words.shape, C, tl.int32), tl.full(words.shape, D, tl.int32)
        return tl.inline_asm_elementwise(
            "{ .reg .b32 r, s, t, low, high; prmt.b32 r, $2, 0, $4; prmt.b32 s, $3, 0, $4; "
            "shr.u32 t, s, $6; shl.b32 s, s, $8; shl.b32 s, s, 1; or.b32 s, s, t; and.b32 s, s, 0x1111; "
            "shr.u32 r, r, $6; shl.b32 r, r, $8; and.b32 r, r, 0x6666; or.b32 s, s, r; "
            "prmt.b32 low, $10, $12, s; prmt.b32 high, $14, $16, s; "
            "prmt.b32 $0, low, high, 0x6240; prmt.b32 $1, low, high, 0x7351; }",
            "=r,=r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r", [words, lowest, byte, odd, even, a, b, c, d],
            dtype=(tl.int16,) * 2, is_pure=True, pack=2,
        )[PLACE % 4 // 2]  # fmt: skip

    @triton.jit
    def table16(words, PLACE: tl.constexpr, A, B, C, D, E, F, G, H, ALONE: tl.constexpr = False):
        """16-bit entries of a table of sixteen for codes PLACE of 16-bit words: A to D the low bytes, E to H the high
        ones.

        Either half of the table is looked up by the code's low three bits; its top bit selects among what was found.
        """
        zeros = 0x5500 if ALONE and PLACE % 2 else 0x4400
        byte = tl.full(words.shape, zeros + (0x31 if PLACE > 1 else 0x20), tl.int32)
        a, b = tl.full(words.shape, A, tl.int32), tl.full(words.shape, B, tl.int32)
        c, d = tl.full(words.shape, C, tl.int32), tl.full(words.shape, D, tl.int32)
        e, f = tl.full(words.shape, E, tl.int32), tl.full(words.shape, F, tl.int32)
        g, h = tl.full(words.shape, G, tl.int32), tl.full(words.shape, H, tl.int32)
        return tl.inline_asm_elementwise(
            "{ .reg .b32 s, t, x, y, low, high; prmt.b32 t, $2, 0, $3; "
            "shr.u32 s, t, 1; and.b32 s, s, 0x4444; or.b32 s, s, 0x3210; and.b32 t, t, 0x7777; "
            "prmt.b32 x, $5, $7, t; prmt.b32 y, $9, $11, t; prmt.b32 low, x, y, s; "
            "prmt.b32 x, $13, $15, t; prmt.b32 y, $17, $19, t; prmt.b32 high, x, y, s; "
            "prmt.b32 $0, low, high, 0x6240; prmt.b32 $1, low, high, 0x7351; }",
            "=r,=r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r", [words, byte, a, b, c, d, e, f, g, h],
            dtype=(tl.int16,) * 2, is_pure=True, pack=2,
        )[PLACE % 2]  # fmt: skip


@triton.jit
def half_of(words, WHICH: tl.constexpr):
    """One of the float16 numbers in words of two or four of them, the lowest bits first, as float32."""
    return (words >> 16 * WHICH).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def half_bits(level):
    """The bits of a float16 as near as can be, int32."""
    return level.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)


@triton.jit
def four_bytes(a, b, c, d, SHIFT: tl.constexpr):
    """One byte of each of four words, those from bit SHIFT on, as a register of a table."""
    low = ((a >> SHIFT) & 255) | (((b >> SHIFT) & 255) << 8)
    return low | (((c >> SHIFT) & 255) << 16) | (((d >> SHIFT) & 255) << 24)


@triton.jit
def joined(high, low):
    """float32 numbers from the two halves of their bits."""
    return ((high.to(tl.int32) << 16) | (low.to(tl.int32) & 0xFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def digits_byte(number):
    """The byte of five ternary digits, given as a whole number: 256 times as a number behind the point, rounded up."""
    return (number * 256 + 242) // 243


@triton.jit
def small_float_by_bits(
    x, MANTISSA: tl.constexpr, LEAST: tl.constexpr, TOP: tl.constexpr, SIGN: tl.constexpr, TIES: tl.constexpr
):
    """The bits of the nearest small float, saturating at TOP; a zero has no sign.

    Numbers from 2**LEAST on have MANTISSA bits behind the first; smaller ones are spaced as those just above.  TIES go
    to even (0), away from zero (1), or down (2).
    """
    size = tl.minimum(tl.abs(x), TOP)
    exponent = tl.maximum(((size.to(tl.int32, bitcast=True) >> 23) & 255) - 127, LEAST)
    steps = size * ((127 + MANTISSA - exponent) << 23).to(tl.float32, bitcast=True)
    if TIES:
        whole = tl.floor(steps)
        beyond = tl.where(x < 0.0, steps - whole >= 0.5, steps - whole > 0.5) if TIES == 2 else steps - whole >= 0.5
        steps = whole.to(tl.int32) + tl.where(beyond, 1, 0)
    else:
        steps = nearest_code(steps)
    code = ((exponent - LEAST) << MANTISSA) + steps
    return tl.where((x < 0.0) & (code > 0), code + SIGN, code)


@triton.jit
def bits_e4m3(x):
    """The nearest e4m3's bits, saturating.  A zero has no sign."""
    return small_float(x, 3, -6, 448.0, 128)


@triton.jit
def power_of_two(size, LESS: tl.constexpr, CARRIED: tl.constexpr = 0):
    """2**(floor(log2(size)) - LESS) within what 8 bits of exponent hold, twice that where CARRIED carries."""
    exponent = (((size.to(tl.int32, bitcast=True) + CARRIED) >> 23) & 255) - 127
    exponent = tl.where(exponent < -126, -126, exponent - LESS)
    return ((tl.minimum(tl.maximum(exponent, -126), 127) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def power_bits(scale):
    """The exponent's bits of a power of two."""
    return (scale.to(tl.int32, bitcast=True) >> 23) & 255


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
