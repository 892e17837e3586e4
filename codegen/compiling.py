"""Ahead-of-time figures of one scheme: `kvdsl compile`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
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

HEAD = ("kernel", "arch", "registers", "spills", "shared", "loop", "packed bytes", "per byte", "predicted share")


def compiled(scheme: Scheme, shape: Shape, name: str, arches: Sequence[str]) -> tuple[Path, list[dict[str, Any]]]:
    """(the generated file, one row a kernel and architecture); of a scheme with tiers the file of the last one, and the
    kernels of each behind its place.  Raises BackendError where this machine cannot."""
    path, rows = Path(), list[dict[str, Any]]()
    for place, (part, its) in shaped(scheme, shape).items():
        path, own = _compiled(part, its, f"{name}_{place}" if place else name, arches)
        rows += [{**row, "kernel": f"{place} {row['kernel']}".strip()} for row in own]
    return path, rows


def _compiled(scheme: Scheme, shape: Shape, name: str, arches: Sequence[str]) -> tuple[Path, list[dict[str, Any]]]:
    plan = plan_for(scheme, shape)
    path = store.find(name, plan, "triton") or store.keep(name, plan, "triton", render(plan, "triton", name))
    records = launches(plan, path.read_text(encoding="utf-8"))
    return path, [asdict(kernel) for kernel in compile_in_child(path, records, arches)]


def told(kernels: Sequence[dict[str, Any]]) -> list[str]:
    """A table for people."""
    rows = [HEAD]
    for kernel in kernels:
        loop = kernel["predicted_share"] is not None
        share = f"{kernel['predicted_share']:.0%} of {kernel['gpu']}" if loop else ""
        per_byte = f"{kernel['instructions_per_byte']:.3f}" if loop else ""
        numbers = (kernel["registers"], kernel["spills"], kernel["shared_bytes"])
        in_loop = (kernel["loop_instructions"] or "", kernel["loop_packed_bytes"] or "")
        rows.append((kernel["kernel"], kernel["arch"], *map(str, (*numbers, *in_loop)), per_byte, share))
    lines = columns(rows, right=(2, 3, 4, 5, 6, 7))
    spilled = [f"{kernel['kernel']} on {kernel['arch']}" for kernel in kernels if kernel["spills"] or kernel["stack"]]
    return [*lines, "", *([f"spills: {', '.join(spilled)}"] if spilled else ["no kernel spills registers"])]
