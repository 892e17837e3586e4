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
