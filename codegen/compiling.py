"""Ahead-of-time figures of one scheme: `kvdsl compile`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvdsl.scheme import Scheme
from kvdsl.segments import shaped
from kvdsl.shape import Shape

from . import render, store
from .answer import columns
from .aot import compile_in_child
from .launches import launches
from .plan import plan_for
from .roofline import LINE
from .static import figures_of, loads_told, pipes_told

HEAD = (
    "kernel", "arch", "registers", "spills", "shared", "instructions", "16-byte loads", "loop", "packed bytes",
    "per byte", "predicted share",
)  # fmt: skip
WIDTH, INDENT = 118, 12  # of the lines behind the table
SHOWN = "decode"  # the kernel that a step of generation waits for


def compiled(scheme: Scheme, shape: Shape, name: str, arches: Sequence[str]) -> tuple[Path, list[dict[str, Any]]]:
    """(the generated file, one row a kernel and architecture: the fields of `CompiledKernel` and what `Figures` adds);
    of a scheme with tiers the file of the last one, and the kernels of each behind its place.  Raises BackendError
    where this machine cannot."""
    path, rows = Path(), list[dict[str, Any]]()
    for place, (part, its) in shaped(scheme, shape).items():
        path, own = _compiled(part, its, f"{name}_{place}" if place else name, arches)
        rows += [{**row, "kernel": f"{place} {row['kernel']}".strip()} for row in own]
    return path, rows


def _compiled(scheme: Scheme, shape: Shape, name: str, arches: Sequence[str]) -> tuple[Path, list[dict[str, Any]]]:
    plan = plan_for(scheme, shape)
    path = store.find(name, plan, "triton") or store.keep(name, plan, "triton", render(plan, "triton", name))
    records = launches(plan, path.read_text(encoding="utf-8"))
    found = compile_in_child(path, records, arches)
    return path, [figures_of(plan, kernel).row() for kernel in found]


def told(kernels: Sequence[dict[str, Any]], *, details: bool = False) -> list[str]:
    """A table for people, and a block for `decode` on each architecture; with `details` for every kernel."""
    rows = [HEAD]
    for kernel in kernels:
        loop = kernel["predicted_share"] is not None
        share = f"{kernel['predicted_share']:.0%} of {kernel['gpu']}" if loop else ""
        per_byte = f"{kernel['instructions_per_byte']:.3f}" if loop else ""
        numbers = (kernel["registers"], kernel["spills"], kernel["shared_bytes"], kernel["instructions"])
        wide = f"{kernel['wide_loads']} of {kernel['memory_loads']}"
        in_loop = (wide, kernel["loop_instructions"] or "", kernel["loop_packed_bytes"] or "")
        rows.append((kernel["kernel"], kernel["arch"], *map(str, (*numbers, *in_loop)), per_byte, share))
    lines = columns(rows, right=(2, 3, 4, 5, 6, 7, 8, 9))
    spilled = [f"{kernel['kernel']} on {kernel['arch']}" for kernel in kernels if kernel["spills"] or kernel["stack"]]
    lines += ["", *([f"spills: {', '.join(spilled)}"] if spilled else ["no kernel spills registers"])]
    for kernel in kernels:
        if details or kernel["kernel"].split()[-1] == SHOWN:
            lines += ["", *block(kernel)]
    return lines


def block(kernel: Mapping[str, Any]) -> list[str]:
    """What one row's kernel is made of; per 128 packed bytes, all warps of a program added up, where it has a loop."""
    title = f"{kernel['kernel']} on {kernel['arch']}"
    loads = f"  loads     {loads_told(kernel['loads'])}"
    if kernel["predicted_share"] is None:
        classes = ", ".join(f"{name} {count}" for name, count in kernel["counts"].items())
        loads += f"; {kernel['wide_loads']} of {kernel['memory_loads']} loads of memory are of 16 bytes a lane"
        return wrapped([f"{title}, the whole kernel", f"  classes   {classes}", loads, *_packing(kernel)])
    lines = kernel["loop_packed_bytes"] / LINE
    classes = ", ".join(f"{name} {kernel['warps'] * n / lines:.2f}" for name, n in kernel["counts"].items())
    shares = ", ".join(f"{share:.0%} of {name}" for name, share in kernel["shares"].items())
    return wrapped(
        [
            f"{title}, main loop, per {LINE} packed bytes: {kernel['slots']:.1f} instructions",
            f"  classes   {classes}",
            f"  cycles    {pipes_told(kernel['work'])}",
            f"  products  {_products(kernel)}",
            loads + f"; {kernel['loop_copied_bytes']} bytes of memory for {kernel['loop_packed_bytes']} packed ones",
            f"  predicted {shares}",
        ]
    )


def _packing(kernel: Mapping[str, Any]) -> list[str]:
    """What a program of a pack kernel moves, and what it takes for each number."""
    if kernel["elements"] is None:
        return []
    each, straight = kernel["instructions_per_element"], kernel["straight_instructions"]
    work = f"  work      {straight} instructions of each of {kernel['warps']} warps, slow paths and early ends left out"
    tokens = kernel["tokens"]
    return [
        f"  bytes     {kernel['bytes_read'] / tokens:g} read and {kernel['bytes_written'] / tokens:g} written a token "
        f"and kv head, {tokens} tokens a program",
        f"{work}: {each:.1f} a number" if each is not None else "  work      not told a number, the kernel has loops",
    ]


def wrapped(texts: Sequence[str]) -> list[str]:
    """Lines of a terminal's width, broken behind commas."""
    lines: list[str] = []
    for text in texts:
        first, *rest = re.split(r"(?<=[,;]) ", text)
        lines.append(first)
        for part in rest:
            if len(lines[-1]) + 1 + len(part) > WIDTH:
                lines.append(" " * INDENT + part)
            else:
                lines[-1] += " " + part
    return lines


def _products(kernel: Mapping[str, Any]) -> str:
    """Products on matrix units against the fewest that the codes take."""
    found, ideal, ratio = kernel["mma"], kernel["ideal_mma"], kernel["mma_ratio"]
    if kernel["hidden_mma"]:
        return f"{kernel['hidden_mma']} an iteration in tensor memory, whose sizes are not in the code"
    if ideal is None:
        return f"{found:.2f} of 16x8x16"
    return f"{found:.2f} of 16x8x16, {ratio:.2f} times the {ideal:.2f} that the codes take"
