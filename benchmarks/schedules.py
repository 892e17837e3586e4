"""`python benchmarks/schedules.py FILE [NAME ...]`: what decode takes with every number of programs, on a GPU.

Of each scheme and size the pages of a sequence are shared by as many programs as make a difference, its edges by 1, 2,
4, ... more; decode and merge are timed in a CUDA graph, the L2 cache emptied before.  The model of the GPU
(`codegen/occupancy.py`) is fitted to this; `tests/test_occupancy.py` holds it to `results/schedules/`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton

from kvdsl import schemes
from kvdsl.bench import Size, numbers
from kvdsl.bench_cache import filled
from kvdsl.codegen import build
from kvdsl.codegen.occupancy import MOST_SPLITS, counts
from kvdsl.codegen.run_triton import _parts
from kvdsl.inputs import DTYPES
from kvdsl.timing import clock_of, timed

NAMES = ("token2", "token4", "int8_token_head", "channel4", "kivi2", "quarot4", "token3", "fp16")
SIZES = (
    "1x8x1024", "1x8x2048", "1x8x4096", "1x8x8192", "1x8x32768", "4x8x8192", "8x8x1024", "8x8x4096", "64x8x2048",
    "128x8x1024", "32x8x8192", "16x8x16384", "8x8x131072",
)  # fmt: skip
SAMPLES = 11
MOST = 14  # numbers of programs for the pages of a sequence that are timed, beside those that fill up a power of two
EDGES = (1, 2, 4, 8, 16)


def thinned(found: list[int]) -> list[int]:
    """About MOST of these numbers, with the first and the last."""
    step = -(-len(found) // MOST)
    return sorted({*found[::step], found[-1]})


def row(name: str, text: str) -> dict[str, Any]:
    """All that was timed of a scheme and a size."""
    device = torch.device("cuda", torch.cuda.current_device())
    size = Size.parse(text)
    kernels = build(getattr(schemes, name), size.shape, "triton")
    normal = numbers(size, device, dtype=DTYPES[size.shape.dtype])
    query = normal(size.q_heads, 1)
    full: Any = filled(kernels, size.batch, size.tokens, normal)
    module: Any = kernels.module
    segments = [(module, full.cache.state(), full.cache.params, None)]
    full.attend(query)  # tells how many programs a processor holds
    (part,) = _parts(query, segments, None, None)
    clock = clock_of(device)

    def step(one: Any) -> None:
        scratch = one.own()
        module._attend(one, scratch)
        module._output("merge", one, scratch, one.count)

    work, room = module._work_of(part), module.room(part.form)
    each = room.places // work.programs  # of a sequence, where all run at once
    most = min(work.pages, MOST_SPLITS, max(2, 3 * each))
    few = thinned(counts(work.pages, most, max(1, min(each // 8, work.pages))))
    edges = [count for count in EDGES if count < 2 * work.edges]
    full_up = {2**i - more for i in range(2, 8) for more in edges[:3]}
    pairs = sorted(
        (count, more) for count in {*few, part.clean, *(n for n in full_up if few[0] <= n <= most)} for more in edges
    )
    timed(lambda: step(part), clock)  # the GPU's clocks rise
    taken = [
        (*pair, timed(lambda one=one: step(one), clock, samples=SAMPLES).median * 1e6)  # type: ignore[misc]
        for pair in pairs
        for one in [replace(part, clean=pair[0], edges=pair[1])]
    ]
    return {
        "scheme": name, "shape": text, "programs": work.programs, "pages": work.pages,
        "page_tokens": work.page_tokens, "edges": work.edges, "residents": room.residents,
        "timed": [(count, more, round(us, 2)) for count, more, us in taken],
    }  # fmt: skip


def rows(names: list[str], seconds: float) -> Iterator[dict[str, Any]]:
    """Those of all schemes and sizes, until the time is up."""
    begin = time.monotonic()
    for text in SIZES:
        for name in names:
            if time.monotonic() - begin > seconds:
                return
            found = row(name, text)
            best = min(found["timed"], key=lambda one: one[2])
            print(f"{name:16} {text:11} best {best}", flush=True)
            yield found
            torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="where results go, JSON")
    parser.add_argument("names", nargs="*", default=list(NAMES), help="schemes")
    parser.add_argument("--seconds", type=float, default=3600, help="begin no scheme and size after these")
    given = parser.parse_args()
    document = {
        "device": torch.cuda.get_device_name(),
        "processors": torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count,
        "versions": {"torch": torch.__version__.partition("+")[0], "triton": triton.__version__},
        "date": datetime.date.today().isoformat(),
        "what": "decode and merge in a CUDA graph, L2 emptied before, median of 11, microseconds; timed: programs a "
        "sequence for its pages, programs for its edges, microseconds",
        "rows": [],
    }
    for found in rows(given.names, given.seconds):
        document["rows"].append(found)  # type: ignore[attr-defined]
        given.file.write_text(json.dumps(document, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
