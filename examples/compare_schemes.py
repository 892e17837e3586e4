"""Five schemes on a model of yours: bits, what each loses, and a report to open in a browser.

    python examples/compare_schemes.py [MODEL] [--out FOLDER] [--windows N]

MODEL is a folder in the transformers format, a GGUF file, or smollm2, which is fetched the first time (93 MB).
`kvdsl eval` does the same with more of all.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import kvdsl
from kvdsl.codegen import report
from kvdsl.evaluation import Evaluation, Settings

SCHEMES = ["kivi2", "kivi4", "turboquant3", "quarot4", "zipcache"]


def main(model: str = "smollm2", out: Path | None = None, windows: int = 2) -> Evaluation:
    report.needed()  # says now what is not installed, not behind the measuring
    folder = out or Path(tempfile.mkdtemp(prefix="kvdsl-"))

    # A window: 512 tokens of a novel are packed, the 64 behind them are scored.
    settings = Settings(tasks=("perplexity", "layers"), windows=windows, context=512, score=64, sizes=(1024, 4096))
    print(f"{len(SCHEMES)} schemes on {model}, some 40 seconds for one of 135M parameters")
    # What is measured is kept in the folder: started again with it, this goes on where it was stopped.
    found = kvdsl.evaluate(SCHEMES, model, settings=settings, out=folder, leave_out=True)

    print(f"{'scheme':14}{'bits':>6}{'perplexity':>12}{'more':>8}{'KL':>9}{'same token':>12}")
    full = ""
    for one in found.results:
        text = one.tasks.perplexity
        if text is None:
            print(f"{one.scheme:14}left out: {one.refused}")  # a head that its groups do not divide, for one
            continue
        print(f"{one.scheme:14}{one.bits:6.2f}{text.perplexity:12.2f}{text.delta:+8.2f}{text.kl:9.4f}{text.same:12.0%}")
        full = f"{text.full_perplexity:.2f}"
    print(f"full precision      {full:>12}")
    print("bits: an element of a window, the tokens that stand there exactly included")

    report.write(found, folder / report.REPORT)
    print(f"report: {folder / report.REPORT}")
    return found


def asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--windows", type=int, default=2)
    return parser.parse_args([] if hasattr(sys, "ps1") else None)  # a notebook's arguments are its own


if __name__ == "__main__":
    found = main(**vars(asked()))  # in a notebook `found` is shown as a table
