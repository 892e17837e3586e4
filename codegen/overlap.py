"""Programmatic dependent launch: of the kernels of one step of attention each but the first is launched before the one
in front of it has ended, and waits in its place for what that writes.

A program says that the next kernel may begin where its outputs are made and only have to be stored: said earlier, as
the documentation has it, a step takes longer, of long contexts because programs that wait take the places of those that
work, of short ones though its programs end sooner by the GPU's own clock.  Microseconds on an H200, a merge launched in
the usual way, where outputs are stored, and where programs begin: `token4` 1 x 8 x 1024 9.8, 9.1, 9.2, `token2` there
9.4, 9.0, 11.0, `kivi2` 16 x 8 x 16384 88, 84, 91, `channel4` there 85, 84, 89.  The few programs that map a query say
it where they begin if each page has a program of its own (`soon`): decode does all that needs no query beside them
then.

It is safe: a kernel that is launched early waits before it touches what the one in front of it writes, and what came
before that had ended.  Whatever follows a step begins in the usual way, behind the end of its last kernel, which has
waited for all others.
"""

from __future__ import annotations

from functools import cache

from .launch import ATTEND
from .plan import Plan

MERGES = ("merge", "collect", "unite")
LEAST = (9, 0)  # compute capability


@cache
def overlapping(device: int) -> bool:
    """Whether launches on this GPU can overlap."""
    import torch

    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= LEAST


def overlapped(kernel: str, plan: Plan) -> bool:
    """Whether a kernel is launched before the one in front of it has ended, where the GPU can: the merges, and what
    reads pages for a query that another kernel has mapped."""
    return kernel in MERGES or kernel in ATTEND and plan.maps_query
