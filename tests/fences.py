"""Tensors that end at a page of memory which nobody may touch, and kernels run on them in a child process.

A read or write one byte past a tensor stops the child by a signal instead of finding whatever lies there.
"""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from kvdsl.kernels import AttentionState, KernelSet

PAGE = mmap.PAGESIZE
NONE, READ_WRITE, PRIVATE_ANONYMOUS = 0, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
SOUND, RAISED = 0, 3

torch.set_num_threads(1)  # a forked child has none of its parent's threads and would wait for them

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_empty, _empty_like = torch.empty, torch.empty_like


def fenced(x: Tensor) -> Tensor:
    """A contiguous copy of x whose last byte is followed by an inaccessible page, and whose first page is preceded by
    one.  It is never freed.  Raises OSError where the system gives no memory."""
    size = x.numel() * x.element_size()
    if size == 0:
        return x
    room = -(-size // PAGE) * PAGE
    start = _libc.mmap(None, room + 2 * PAGE, READ_WRITE, PRIVATE_ANONYMOUS, -1, 0)
    if start in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), "mmap")
    for fence in (start, start + PAGE + room):
        if _libc.mprotect(fence, PAGE, NONE):
            raise OSError(ctypes.get_errno(), "mprotect")
    buffer = (ctypes.c_ubyte * size).from_address(start + PAGE + room - size)
    copy = torch.frombuffer(buffer, dtype=torch.uint8).view(x.dtype).view(x.shape)
    return copy.copy_(x)


def _given(value: Any) -> Any:
    if isinstance(value, Tensor):
        return fenced(value)
    if isinstance(value, dict):
        return {name: _given(one) for name, one in value.items()}
    if isinstance(value, AttentionState):
        return replace(value, **{f.name: _given(getattr(value, f.name)) for f in fields(value)})
    return value


def run_fenced(kernels: KernelSet, method: str, *arguments: Any) -> Any:
    """A method of the kernels with every tensor fenced, also those it allocates itself.  In a child only."""
    torch.empty = lambda *size, **options: fenced(_empty(*size, **options))
    torch.empty_like = lambda x, **options: fenced(_empty_like(x, **options))
    return getattr(kernels, method)(*map(_given, arguments))


def outcome(run: Callable[[], object]) -> int:
    """What became of a forked child that runs it: SOUND, RAISED, or minus the number of the signal that stopped it."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = RAISED
        faulthandler.disable()  # a fence that stops it is no news
        try:
            run()
            code = SOUND
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
