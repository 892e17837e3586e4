"""How kernels of one step overlap: the second may be launched before the first has ended, see overlap.py.

Programs of compute capability 9.0 and newer can say and wait; elsewhere a launch waits for the last one's end itself.
"""

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

from .device import INTERPRETED

if INTERPRETED:

    @triton.jit
    def let_next_begin():
        """The kernel behind this one may be launched once all programs have come here."""
        pass

    @triton.jit
    def await_last():
        """From here on all is there that the kernel in front of this one has written."""
        pass

    @triton.jit
    def fetch(lines):
        """Have the L2 cache read the lines of memory at these addresses; nothing waits for them."""
        pass


else:

    @triton.jit
    def let_next_begin():
        """The kernel behind this one may be launched once all programs have come here."""
        if cuda_capability_geq(9, 0):
            tl.extra.cuda.gdc_launch_dependents()

    @triton.jit
    def await_last():
        """From here on all is there that the kernel in front of this one has written."""
        if cuda_capability_geq(9, 0):
            tl.extra.cuda.gdc_wait()

    @triton.jit
    def fetch(lines):
        """Have the L2 cache read the lines of memory at these addresses; nothing waits for them."""
        text: tl.constexpr = "prefetch.global.L2 [$1]; mov.b32 $0, 0;"
        tl.inline_asm_elementwise(text, "=r,l", [lines], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def all_asked_for():
    """Loads above are on their way before what is below is computed.  The assembler would put each of them in front of
    what first needs it, so that a program waits for memory as often as it loads."""
    tl.debug_barrier()
