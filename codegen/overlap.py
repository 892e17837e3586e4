"""Programmatic dependent launch: the merge of a query's partials is launched before the programs that write them have
ended, and waits for them where it stands.

Each program of `decode` and `extend` says at its start that the next kernel may begin; the merge waits, before it reads
or writes anything, until all of them have ended and what they wrote is seen.  It is safe: only merges are launched so.
Whatever follows a merge, the next call's `decode` on the same memory too, begins in the usual way, behind its end, and
a merge ends behind what it has waited for.
"""

from __future__ import annotations

from functools import cache

import torch

LEAST_MAJOR = 9  # compute capability, NVIDIA's
CROWDED = (0.75, 1.5)
"""Programs a processor between which the merge begins in the usual way.  Measured with prototypes on an H200, 4 bits:
1x8x4096 with 512 programs 10.4 -> 9.9 us, 8x8x1024 with 512 11.5 -> 10.5, 1x8x1024 with 64 9.1 -> 8.9; but where about
one stood on each processor, 1x8x1024 with 128 on 132, merges that came early cost about 1 us.  Of the borders nothing
is known but that they lie between these."""


def worthwhile(programs: int, processors: int) -> bool:
    """Whether the merge of what so many programs write should be launched early, where the GPU can."""
    least, most = CROWDED
    return not least <= programs / processors <= most


@cache
def overlapping(major: int) -> bool:
    """Whether launches can overlap on NVIDIA's GPUs of this compute capability, under this Triton, compiled."""
    if major < LEAST_MAJOR:
        return False
    import triton.language as tl

    from .device import INTERPRETED

    cuda = getattr(tl.extra, "cuda", None)
    return not INTERPRETED and all(hasattr(cuda, name) for name in ("gdc_wait", "gdc_launch_dependents"))


def here() -> bool:
    """Whether launches can overlap on the current GPU."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return False
    return overlapping(torch.cuda.get_device_capability()[0])
