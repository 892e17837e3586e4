"""`python benchmarks/static.py > docs/static.md`: what machine code tells of every scheme's decode kernel, as a page.

No GPU is needed.  NAMES takes some schemes alone; `--golden > tests/slots.json` and, of pack kernels, `--golden pack >
tests/packing.json` write what tests hold the kernels to.  Triton keeps what it has compiled in TRITON_CACHE_DIR, by
default build/aot of this checkout, as tests do.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvdsl.codegen.answer import row as markdown_row
from kvdsl.codegen.front_end import ARCHES
from kvdsl.codegen.plan import plan_for
from kvdsl.codegen.roofline import CARDS, LINE
from kvdsl.codegen.static import Figures, figures, loads_told, pipes_told, reasons, untiered
from kvdsl.cost import bits
from kvdsl.rules import shape_faults
from kvdsl.scheme import Scheme
from kvdsl.schemes import ALL
from kvdsl.shape import Shape, usual

ROOT = Path(__file__).resolve().parent.parent
SHAPE = Shape(128, 8, 32)
QUICK = ("int8_token_head", "token4", "kivi4", "token2", "bitdecoding2", "token3")
"""What the fast profile of the tests compiles."""
PACKED = ("int8_token_head", "fp8_token_head", "token4", "int4_token_head", "kivi4", "kivi2")
"""The same of pack kernels."""
RESULTS, LARGEST = ROOT / "benchmarks" / "results", "8x8x131072"
NEAR = 0.1  # of the limit: what the law is good for
REFERENCE, ENOUGH = "H100", 0.85
TOGETHER = 8  # schemes compiled in one process
HEAD = f"""# Static figures

Made by `python benchmarks/static.py > docs/static.md`; not written by hand. Nothing here was run on a GPU: kernels are
compiled ahead of time, and what their machine code has in the main loop is counted. `kvdsl compile NAME` counts the
same for your scheme and shape, and every other kernel. [speed.md](speed.md) has what was measured.

Decode attention at head_dim {SHAPE.head_dim}, {SHAPE.group} query heads a kv head, float16. Cells with three figures
are of {", ".join(ARCHES)}. Of a scheme with tiers there is what its tiers store, where no other scheme stores the same.
Schemes of shared values have their own head_dim, and 32 query heads for one kv head.

* slots: instructions of all warps of a program for {LINE} packed bytes, code that is rarely run left out.
* a loop within the main loop counts as one round: of sums of vectors, which are read so, the work is many times as
  much, and the shares are as many times too large.
* products: m16n8k16 products over the fewest that the codes take, 4/b for {LINE} bytes of codes of b bits. More are of
  maps, vectors of low rank, positions and streams that are multiplied apart. "-": they are of float32, or some are in
  tensor memory, where code does not tell their size; shares are without those.
* registers of a thread; spills: instructions on local memory in the whole kernel.
* copied: of the loop's copies and loads of memory those of 16 bytes a lane, on sm_90.
* the share of each GPU's read limit that the law of `codegen/roofline.py` predicts from the counts by pipe; in brackets
  what was measured at 8x8x131072, where it was, with the kernels of that day (speed.md). The law sees neither latency
  nor how many programs are resident: it says what is possible.
"""


def cards() -> list[str]:
    """What is assumed of the GPUs."""
    rows = [("GPU", "code", "SMs", "GHz", "TB/s", f"cycles for {LINE} bytes", "figures are")]
    for gpu in CARDS:
        numbers = (f"{gpu.processors}", f"{gpu.clock}", f"{gpu.bandwidth}", f"{gpu.cycles_per_line:.1f}")
        rows.append((gpu.name, gpu.arch, *numbers, gpu.origin))
    return table(rows, right=range(2, 6))


def measured() -> dict[tuple[str, str], float]:
    """(GPU, scheme) -> the share of its limit that `kvdsl bench` measured at the shape with most bytes."""
    found: dict[tuple[str, str], float] = {}
    for path in sorted(RESULTS.glob("*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        gpus = [gpu.name for gpu in CARDS if gpu.name.split()[0] in document["device"]]
        for one in document["results"]:
            if one["shape"] == LARGEST and one.get("share") and one["scheme"] in ALL:
                found |= {(gpu, one["scheme"]): one["share"] for gpu in gpus}
    return found


def compared(compiled: Mapping[str, Mapping[str, Figures]]) -> list[str]:
    """How far the law is from what was measured, in one sentence a GPU."""
    lines, known = [], measured()
    for gpu in CARDS:
        pairs = [
            (rows[gpu.arch].kernel.shares[gpu.name], known[gpu.name, name])
            for name, rows in compiled.items()
            if (gpu.name, name) in known
        ]
        if not pairs:
            continue
        near = sum(abs(law - real) <= NEAR for law, real in pairs)
        above = max(law - real for law, real in pairs)
        lines.append(
            f"Of {len(pairs)} schemes measured on the {gpu.name} {near} are within {100 * NEAR:.0f} points of the law, "
            f"which is {100 * above:.0f} points too high at most."
        )
    return lines


def table(rows: Sequence[Sequence[str]], right: Sequence[int]) -> list[str]:
    """A table of Markdown; the first row is its head."""
    rule = markdown_row("---:" if i in right else "---" for i in range(len(rows[0])))
    return [markdown_row(rows[0]), rule, *map(markdown_row, rows[1:])]


def schemes(names: Sequence[str]) -> dict[str, Scheme]:
    """Those of these names, or all."""
    known = {name: one for name, one in untiered(ALL).items() if not shape_faults(one, usual(one))}
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"no scheme without tiers is called {', '.join(unknown)}; take of {', '.join(known)}")
    return {name: known[name] for name in names} if names else known


def found(chosen: Mapping[str, Scheme], arches: Sequence[str], workers: int) -> dict[str, dict[str, Figures]]:
    """The decode kernel of every scheme by architecture."""
    names, all_ = list(chosen), dict[str, dict[str, Figures]]()
    for begin in range(0, len(names), TOGETHER):
        some = {name: chosen[name] for name in names[begin : begin + TOGETHER]}
        print(f"{begin} of {len(names)}: {', '.join(some)}", file=sys.stderr, flush=True)
        for shape in dict.fromkeys(map(usual, some.values())):
            alike = {name: one for name, one in some.items() if usual(one) == shape}
            for name, rows in figures(alike, shape, arches, cache_folder=cache(), workers=workers).items():
                all_[name] = {one.kernel.arch: one for one in rows}
    return all_


def page(chosen: Mapping[str, Scheme], compiled: Mapping[str, Mapping[str, Figures]]) -> str:
    """The page: the table, then what keeps the slow ones from the limit."""
    versions = {one.kernel.triton for rows in compiled.values() for one in rows.values()}
    those = f"Triton {', '.join(sorted(versions))}; {len(chosen)} of the {len(schemes([]))} schemes that there are."
    lines = [HEAD, those, "", *cards(), ""]
    head = ["scheme", "bits", "slots", "products", "registers", "spills", "copied", *(gpu.name for gpu in CARDS)]
    rows = [head, *(cells(name, chosen[name], compiled[name]) for name in chosen)]
    lines += [*table(rows, right=range(1, len(head))), "", *compared(compiled), ""]
    slow = [name for name in chosen if share(compiled[name]) < ENOUGH]
    lines += [f"## Under {ENOUGH:.0%} of the {REFERENCE}", ""]
    lines += [] if slow else ["None.", ""]
    for name in slow:
        lines += [*section(name, chosen[name], compiled[name]["sm_90"]), ""]
    return "\n".join(lines)


def share(rows: Mapping[str, Figures]) -> float:
    """The predicted share of the reference."""
    return rows["sm_90"].kernel.shares[REFERENCE]


def cells(name: str, scheme: Scheme, rows: Mapping[str, Figures]) -> list[str]:
    """A row of the table."""

    def each(form: str, values: Sequence[Any]) -> str:
        texts = ["-" if value is None else form.format(value) for value in values]
        return texts[0] if len(set(texts)) == 1 else " / ".join(texts)

    ordered = [rows[arch] for arch in ARCHES]
    kernels = [one.kernel for one in ordered]
    shares = {gpu: one for kernel in kernels for gpu, one in kernel.shares.items()}
    real = {key: f" ({one:.0%})" for key, one in measured().items()}
    return [
        f"`{name}`",
        f"{bits(scheme).mean:.2f}",
        each("{:.1f}", [kernel.slots for kernel in kernels]),
        each("{:.2f}", [one.mma_ratio for one in ordered]),
        each("{}", [kernel.registers for kernel in kernels]),
        each("{}", [kernel.spills for kernel in kernels]),
        f"{rows['sm_90'].wide_loads} of {rows['sm_90'].memory_loads}",
        *(f"{shares[gpu.name]:.0%}" + real.get((gpu.name, name), "") for gpu in CARDS),
    ]


def section(name: str, scheme: Scheme, one: Figures) -> list[str]:
    """What one scheme is bound by on sm_90: cycles by pipe, the counts behind them, and what asks for them."""
    kernel, lines = one.kernel, one.kernel.loop_packed_bytes / LINE
    classes = ", ".join(f"{kind} {kernel.warps * count / lines:.1f}" for kind, count in kernel.counts.items())
    told = [f"### `{name}`", "", f"{kernel.shares[REFERENCE]:.0%} at {kernel.slots:.1f} slots: {pipes_told(one.work)}."]
    told += ["", f"* instructions for {LINE} bytes: {classes}", f"* loads: {loads_told(kernel.loads)}"]
    return told + [f"* {reason}" for reason in reasons(plan_for(scheme, usual(scheme)))]


def golden(compiled: Mapping[str, Mapping[str, Figures]]) -> str:
    """Slots and the version of Triton they are of, as tests read them."""
    versions = {one.kernel.triton for rows in compiled.values() for one in rows.values()}
    slots = {name: {arch: round(one.kernel.slots, 2) for arch, one in rows.items()} for name, rows in compiled.items()}
    return json.dumps({"triton": max(versions), "slots": slots}, indent=1)


def golden_of_packing(chosen: Mapping[str, Scheme], workers: int) -> str:
    """Instructions a number of both pack kernels on sm_90, as tests read them."""
    kernels = ("pack_keys", "pack_values")
    rows = figures(chosen, SHAPE, ("sm_90",), kernels=kernels, cache_folder=cache(), workers=workers)
    versions = {one.kernel.triton for row in rows.values() for one in row}
    told = {
        name: {one.kernel.kernel: round(one.instructions_per_element or 0, 2) for one in row}
        for name, row in rows.items()
    }
    return json.dumps({"triton": max(versions), "instructions_per_element": told}, indent=1)


def cache() -> Path:
    """Where Triton keeps what it has compiled."""
    return Path(os.environ.get("TRITON_CACHE_DIR") or ROOT / "build" / "aot")


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks/static.py", description="Static figures of decode kernels.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="schemes, or what a tier stores; default all")
    parser.add_argument(
        "--golden",
        nargs="?",
        const="decode",
        choices=("decode", "pack"),
        help="on sm_90, of those that fast tests take",
    )
    parser.add_argument("--workers", type=int, default=2, help="processes")
    given = parser.parse_args()
    if given.golden == "pack":
        print(golden_of_packing(schemes(given.names or PACKED), given.workers))
        return
    if given.golden:
        print(golden(found(schemes(given.names or QUICK), ("sm_90",), given.workers)))
        return
    chosen = schemes(given.names)
    print(page(chosen, found(chosen, ARCHES, given.workers)), end="")


if __name__ == "__main__":
    main()
