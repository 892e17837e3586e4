"""A scheme for a budget of 3 bits: a small grid is measured, one of it is named and why, and text comes through it.

    python examples/find_a_scheme.py [MODEL] [--windows N]

MODEL is a folder in the transformers format, a GGUF file, or smollm2, which is fetched the first time (93 MB).
`kvdsl sweep` and `kvdsl recommend` do the same; without a grid, `kvdsl recommend` looks at all schemes that there are.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import kvdsl
from kvdsl.evaluation import Settings
from kvdsl.generation import generate, opened
from kvdsl.models.text import botchan
from kvdsl.sweeping import Sweep

BITS = 3.0
GRID = {
    "base": "token2",  # 2 bits, a scale for a token of a head
    "beside": ["kivi2", "turboquant3"],  # measured as they are
    "axes": {
        "keys.code": ["Codebook(2, 'normal')", "Codebook(3, 'normal')"],
        "keys.transform": ["none", "random_hadamard"],
        "sinks": [0, 4],
    },
}


def main(model: str = "smollm2", windows: int = 1) -> Sweep:
    folder = Path(tempfile.mkdtemp(prefix="kvdsl-"))
    network = opened(model)

    print("measuring 10 schemes, some 30 seconds for a model of 135M parameters")
    settings = Settings(tasks=("perplexity",), windows=windows, context=512, score=64, sizes=(1024,))
    swept = kvdsl.sweep(GRID, network, settings=settings, out=folder / "sweep.sqlite", compiled=False)
    front = swept.front("bits")  # none has fewer bits and less divergence
    for one in sorted(swept.members, key=lambda one: one.figures["kl"] or 0):
        mark = "front" if one in front else ""
        print(f"{one.figures['packed_bits']:6.3f} bits, KL {one.figures['kl']:.4f}  {one.name}  {mark}".rstrip())

    spec = folder / "mine.toml"
    best = kvdsl.recommend(None, bits=BITS, sweep=folder / "sweep.sqlite", out=spec)
    print(f"\nwithin {BITS:g} bits: {best.chosen.figured.name}")
    print("\n".join(f"  {why}" for why in best.why))
    print(f"\n{spec}\n{spec.read_text()}")

    mine = kvdsl.load(str(spec))
    assert mine == best.scheme
    start = botchan()[:1500]
    made = generate(mine, network, start[: start.rindex(".") + 1], tokens=24)
    print(f"packed          {made['text'].strip()!r}")
    print(f"full precision  {made['baseline_text'].strip()!r}")
    print(f"{made['cache_bytes']:,} bytes of cache in place of {made['baseline_bytes']:,}")
    return swept


def asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--windows", type=int, default=1)
    return parser.parse_args([] if hasattr(sys, "ps1") else None)  # a notebook's arguments are its own


if __name__ == "__main__":
    found = main(**vars(asked()))
