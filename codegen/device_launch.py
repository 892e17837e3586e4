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
