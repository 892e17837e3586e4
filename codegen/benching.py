"""Speed, in figures: `kvdsl bench`, on the GPU of this machine or, as ratios alone, on its CPU."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvdsl.scheme import Scheme

from .answer import progress

if TYPE_CHECKING:
    from rich.table import Table

GPU_SHAPES = ("8x8x131072", "16x8x16384", "1x8x32768")
CPU_SHAPES = ("1x8x2048",)
ON_A_CPU = "no GPU here: the torch kernels on this CPU, as ratios of one run; they say nothing about a GPU"


def results(schemes: Mapping[str, Scheme], shapes: Sequence[str], group: int, head_dim: int) -> dict[str, Any]:
    """device, versions, date, read_limit_gbps (None on a CPU), what kept a path from being taken, and a row a scheme
    and shape; `failed` where a shape does not fit the memory."""
    import torch

    from kvdsl.bench import Size, measured, read_limit, result

    from . import build
    from .doctor import versions

    gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    sizes = [Size.parse(text, group, head_dim) for text in shapes or (GPU_SHAPES if gpu else CPU_SHAPES)]
    with progress("measuring how fast memory is read"):
        limit = read_limit(device) if gpu else None
    rows: list[dict[str, Any]] = []
    for name, scheme in schemes.items():
        for size in sizes:
            with progress(f"{name} at {size}"):
                kernels = build(scheme, size.shape, backend="triton" if gpu else "torch")
                try:
                    rows.append(result(name, size, measured(kernels, size, device), limit))
                except torch.OutOfMemoryError as error:
                    rows.append({"scheme": name, "kernel": "decode", "shape": str(size), "failed": _first(error)})
            if gpu:
                torch.cuda.empty_cache()
    return {
        "device": torch.cuda.get_device_name(device) if gpu else "cpu",
        "versions": versions(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": " ".join(["kvdsl", *sys.argv[1:]]),
        "note": None if gpu else ON_A_CPU,
        "read_limit_gbps": None if limit is None else limit / 1e9,
        "results": rows,
    }


def _first(error: Exception) -> str:
    return str(error).partition(". ")[0]


def told(found: Mapping[str, Any]) -> Table:
    """A table for the terminal: a row a scheme and shape."""
    from rich.table import Table

    limit = found["read_limit_gbps"]
    title = found["note"] or f"{found['device']}, read limit {limit:.0f} GB/s"
    table = Table("scheme", "shape", "us", "GB/s", "of the limit", "over fp16", "over unpack + fp16", title=title)
    for column in table.columns[2:]:
        column.justify = "right"
    for row in found["results"]:
        table.add_row(row["scheme"], row["shape"], *cells(row))
    return table


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """A row's figures: microseconds, GB/s, share of the limit, times over the two others."""
    if "failed" in row:
        return (row["failed"], "", "", "", "")
    formats = {
        "us": "{:.1f}",
        "gbps": "{:.0f}",
        "share": "{:.0%}",
        "speedup_fp16": "{:.2f}",
        "speedup_unpack": "{:.1f}",
    }
    return tuple("" if row[key] is None else text.format(row[key]) for key, text in formats.items())
