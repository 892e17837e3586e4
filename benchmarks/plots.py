"""`python benchmarks/plots.py`: the figures of benchmarks/results, drawn beside docs/speed.md: docs/speed_<device>.svg.

To the left what a scheme's bits make of speed where contexts are long, to the right what contexts make of it.
"""

from __future__ import annotations

import hashlib
import json
import runpy
from collections.abc import Mapping
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from kvdsl.codegen.bench_plot import COLOURS, MARKERS

ROOT = Path(__file__).resolve().parent.parent
PAGE = runpy.run_path(str(Path(__file__).with_name("page.py")))
LONG = "8x8x131072"
SHAPES = ("1x8x1024", "1x8x4096", "64x8x2048", "1x8x32768", "16x8x16384", LONG)
MOST = 16  # times over SDPA that are drawn: schemes that drop most tokens are beyond
SWEPT = ("fp16", "int8_token_head", "token4", "kivi4", "token3", "token2", "kivi2", "quarot4", "kvtq", "qjl")
TICKS = (0.05, 0.1, 0.2, 0.5, 1, 2, 4, 8)

Times = dict[str, dict[str, tuple[float, float]]]
"""Scheme -> shape -> (bits an element, times over SDPA)."""


def devices() -> dict[str, Times]:
    """What was measured on every GPU, the last of each scheme and shape, as in docs/speed.md; bits of a scheme from any
    of the results, as the first ones do not say them."""
    found = PAGE["documents"]()
    bits = {row["scheme"]: row["bits"] for document in found for row in document["results"] if "bits" in row}
    return {
        device: {
            scheme: {shape: (bits[scheme], exact / row["us"]) for shape, (row, exact, _) in cells.items()}
            for scheme, cells in PAGE["newest"](some).items()
            if scheme in bits
        }
        for device, some in PAGE["by_device"](found).items()
    }


def path(device: str) -> Path:
    """Where a GPU's plot is."""
    return ROOT / "docs" / PAGE["plot"](device)


def digest(times: Times) -> str:
    """Of what is drawn, kept in the file."""
    return hashlib.sha256(json.dumps(times, sort_keys=True).encode()).hexdigest()


def fastest(points: Mapping[str, tuple[float, float]]) -> set[str]:
    """Schemes than which none of as few bits is as fast."""
    return {
        name
        for name, (bits, times) in points.items()
        if not any(other <= bits and more > times for other, more in points.values())
    }


def drawn(device: str, times: Times) -> Figure:
    """Both plots of a GPU."""
    figure = Figure(figsize=(12, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    points = {name: cells[LONG] for name, cells in times.items() if LONG in cells and cells[LONG][1] < MOST}
    left.scatter(*zip(*points.values(), strict=True), s=14, color=COLOURS[0])
    for name in sorted(fastest(points) | {*SWEPT} & {*points}):
        left.annotate(name, points[name], xytext=(4, 3), textcoords="offset points", fontsize=7)
    widths = [1 + i / 10 for i in range(171)]
    left.plot(widths, [16 / width for width in widths], color="black", linewidth=1, label="16 / bits")
    left.axhline(1, color="grey", linewidth=1)
    left.set(xlabel="bits an element, metadata included", ylabel="times over SDPA, float16", yscale="log")
    left.set(title=f"{device}, {LONG}", ylim=(0.03, MOST), xlim=(0, 17))
    for i, name in enumerate(name for name in SWEPT if name in times):
        known = [shape for shape in SHAPES if shape in times[name]]
        right.plot(
            [SHAPES.index(shape) for shape in known], [times[name][shape][1] for shape in known],
            color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)], linewidth=1, label=name,
            linestyle="-" if i < len(COLOURS) else "--",
        )  # fmt: skip
    right.axhline(1, color="grey", linewidth=1)
    right.set_xticks(range(len(SHAPES)), SHAPES, rotation=20)
    right.set(xlabel="batch x kv heads x tokens", yscale="log", ylim=(0.15, 8), title="short contexts to long ones")
    for axes in (left, right):
        axes.set_yticks(TICKS, [f"{tick:g}" for tick in TICKS])
        axes.yaxis.set_minor_formatter("")
        axes.legend(fontsize=7)
    return figure


def main() -> None:
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "kvdsl", "font.size": 9}):
        for device, times in devices().items():
            metadata = {"Date": None, "Description": digest(times)}
            drawn(device, times).savefig(path(device), metadata=metadata)


if __name__ == "__main__":
    main()
