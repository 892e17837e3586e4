"""`python benchmarks/page.py > docs/speed.md`: the figures of benchmarks/results, as a page.

Each file there is what `kvdsl bench ... --json` printed on a GPU; of a scheme and shape that several have, the last
counts.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvdsl.codegen.answer import row as markdown_row

RESULTS = Path(__file__).resolve().parent / "results"
HEAD = """# Speed

Made by `python benchmarks/page.py` from `benchmarks/results/`; not written by hand. `kvdsl bench` measures the same on
your GPU.

Decode attention: one query a sequence, 4 query heads a kv head, head_dim 128, a cache filled with normal numbers.
All kernels of a step are timed together (a query's map where there is one, pages and exact rows, merging, an output's
map), in a CUDA graph, the L2 cache emptied by reading before each of 21 samples; medians. Lengths differ by up to a
page. A shape is batch x kv heads x tokens.

A cell is microseconds (share of the read limit and times over SDPA on float16 numbers, both of the same run, of SDPA
the median of its times beside all schemes); behind a * by the schedule that `kvdsl tune` had found for the size on that
machine, else by that of the model of the GPU. Machines of one kind have limits of their own. Runs of the first versions
measured theirs by reductions of torch alone, not by a kernel that only reads, too: shares there are of the highest
limit of all.
"unpack" is how many times longer it takes to decode the cache and run SDPA on it, at the largest shape.
"""
MODELS = """## Whole models

A Llama of random numbers in the shape of one of 8 billion (32 layers, 32 query and 8 kv heads of 128, float16), by
`python benchmarks/generation.py`: `generate()` of transformers with its own dynamic cache and its static one, of which
it compiles a step, and with schemes' caches, appended to and in place. Memory of schemes' rows of 2026-11-28 is of a
version that held a prompt's exact keys and values until the next step, which it does not any more.
"""


def documents() -> list[dict[str, Any]]:
    """The results, file by file."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]


def page(found: Iterable[Mapping[str, Any]]) -> str:
    """A section a device."""
    return "\n".join([HEAD, *(line for name, part in by_device(found).items() for line in section(name, part))])


def by_device(found: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The results, GPU by GPU."""
    devices: dict[str, list[Mapping[str, Any]]] = {}
    for document in found:
        devices.setdefault(document["device"], []).append(document)
    return devices


def plot(device: str) -> str:
    """The name of the file with a GPU's plots, see `benchmarks/plots.py`."""
    return f"speed_{device.split()[1].lower()}.svg"


def section(device: str, found: list[Mapping[str, Any]]) -> list[str]:
    """A table: a row a scheme, a column a shape."""
    rows = [row for document in found for row in timed(document["results"])]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    versions = {f"torch {document['versions']['torch']}, Triton {document['versions']['triton']}" for document in found}
    limits = ", ".join(f"{document['read_limit_gbps']:.0f}" for document in found)
    lines = [f"## {device}", "", f"![Speed by bits, and by contexts]({plot(device)})", ""]
    lines += [f"{'; '.join(sorted(versions))}; {', '.join(sorted({d['date'] for d in found}))}."]
    lines += [f"Read limit of the runs: {limits} GB/s.", "", markdown_row(("scheme", *shapes, "unpack"))]
    lines.append("| --- |" + " ---: |" * (len(shapes) + 1))
    lines.append(markdown_row(("SDPA, float16", *(f"{exact(rows, shape):.1f}" for shape in shapes), "")))
    for name, cells in newest(found).items():
        columns = (cell(*cells[shape]) if shape in cells else "" for shape in shapes)
        slower = next(iter(cells.values()))[0]["speedup_unpack"]
        lines.append(markdown_row((f"`{name}`", *columns, "" if slower is None else f"{slower:.0f}")))
    lines += others(found)
    lines += ["", "How they were run:", "", *(f"* `{document['command']}`" for document in found), ""]
    return lines


def newest(found: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, tuple[Mapping[str, Any], float, float]]]:
    """Of every scheme and shape the last row, and of its run microseconds of SDPA and the read limit, GB/s."""
    last: dict[str, dict[str, tuple[Mapping[str, Any], float, float]]] = {}
    highest = max(document["read_limit_gbps"] for document in found)
    for document in found:
        rows = timed(document["results"])
        limit = document["read_limit_gbps"] if "us_launch" in document else highest  # of a first version
        for row in rows:
            last.setdefault(row["scheme"], {})[row["shape"]] = (row, exact(rows, row["shape"]), limit)
    return last


def timed(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those that were measured."""
    return [row for row in rows if row.get("us") is not None]


def others(found: Iterable[Mapping[str, Any]]) -> list[str]:
    """A table of other systems in the same runs, where some were there; documents of older versions have none."""
    rows = [
        {**row, "share": row["gbps"] / document["read_limit_gbps"]}
        for document in found
        for row in timed(document.get("peers", ()))
    ]
    if not rows:
        return []
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    lines = ["", "Other systems in the same runs:", "", markdown_row(("system", "bits", *shapes, "error"))]
    lines.append("| --- |" + " ---: |" * (len(shapes) + 2))
    for name in dict.fromkeys(row["peer"] for row in rows):
        own = {row["shape"]: row for row in rows if row["peer"] == name}
        cells = [
            f"{own[shape]['us']:.1f} ({own[shape]['share']:.0%}, {own[shape]['speedup_fp16'] or 0:.2f})"
            if shape in own
            else ""
            for shape in shapes
        ]
        errors = [row["error"] for row in own.values() if row["error"] is not None]
        bits = next(iter(own.values()))["bits"]
        lines.append(markdown_row((name, f"{bits:.2f}", *cells, f"{max(errors):.0e}" if errors else "unchecked")))
    return lines


def exact(rows: Iterable[Mapping[str, Any]], shape: str) -> float:
    """Microseconds of SDPA at a shape: now and then a sample of it is a tenth slower than the others."""
    return statistics.median(row["us_fp16"] for row in rows if row["shape"] == shape)


def cell(row: Mapping[str, Any], over: float, limit: float) -> str:
    """Microseconds (share of the limit, times over float16), with a star where the schedule was found by timing."""
    star = "*" if row.get("schedule", "model").startswith("tuned") else ""  # documents of older versions have none
    return f"{star}{row['us']:.1f} ({row['gbps'] / limit:.0%}, {over / row['us']:.2f})"


def models() -> list[str]:
    """Tables of whole models: what `benchmarks/generation.py ... --json` has measured."""
    found = [json.loads(path.read_text()) for path in sorted((RESULTS / "generation").glob("*.json"))]
    lines = [MODELS]
    for one in found:
        about = f"{one['device']}, torch {one['torch']}, {one['date']}"
        if one["what"] == "speed":
            lines += [f"{about}: {one['batch']} sequences behind a prompt of {one['tokens']} tokens.", ""]
            lines += [markdown_row(("cache", "ms a token", "GB at most beside the weights")), "| --- | ---: | ---: |"]
            for row in one["rows"]:  # the first run compiles
                lines.append(markdown_row((row["way"], f"{min(row['ms'][1:]):.2f}", f"{row['bytes'] / 1e9:.1f}")))
        else:
            exact = one["rows"][0]["batch"]
            lines += [f"{about}: the largest batch of {one['tokens']} tokens a sequence, by {one['batch']}.", ""]
            lines += [markdown_row(("cache", "sequences", "times")), "| --- | ---: | ---: |"]
            for row in one["rows"]:
                lines.append(markdown_row((row["way"], str(row["batch"]), f"{row['batch'] / exact:.2f}")))
        lines.append("")
    return lines


def whole() -> str:
    """docs/speed.md."""
    return "\n".join([page(documents()), *models()])


if __name__ == "__main__":
    print(whole(), end="")
