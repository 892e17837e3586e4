"""`python benchmarks/questions.py`: the open questions of the seed papers, measured on the small model and its text.

Figures go to benchmarks/questions.json; `--page > docs/questions.md` makes the page of them and measures nothing.
Names of questions take some alone.  What is measured is kept in build/questions as it comes, so that a run which was
stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from questions_counts import COUNTS
from questions_members import MEMBERS, Member
from questions_page import page

from kvdsl.cost import bits
from kvdsl.evaluation import Settings, evaluate
from kvdsl.evaluation.results import Evaluation
from kvdsl.generation import Loaded
from kvdsl.shape import Shape

ROOT = Path(__file__).resolve().parent.parent
FIGURES, ROWS = ROOT / "benchmarks" / "questions.json", ROOT / "build" / "questions"
DIGITS = 6
USUAL = Settings(tasks=("perplexity", "layers"), windows=5, sizes=(1024,))
SETTINGS = {"qjl": USUAL.with_(windows=3)}
"""Of questions whose members are many, each with several seeds."""


def asked(
    members: Sequence[Member],
    model: str | Loaded,
    settings: Settings,
    *,
    text: str | None = None,
    text_name: str = "text",
    out: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """What the model loses through each member, as plain numbers, window by window."""
    schemes = {one.name: one.scheme for one in members}
    options: dict[str, Any] = {"settings": settings, "out": out, "say": say}
    return plain(members, evaluate(schemes, model, text=text, text_name=text_name, **options))


def plain(members: Sequence[Member], found: Evaluation) -> dict[str, Any]:
    """The figures of an evaluation that the page needs, and of what they are."""
    model, text = found.about_model, found.about_text
    shape, rows = Shape(model.head_dim, model.kv_heads), []
    for member, result in zip(members, found.results, strict=True):
        lost, layers = result.tasks.perplexity, result.tasks.layers
        assert lost is not None and layers is not None
        counted = bits(member.scheme, shape.head_dim, shape.kv_heads)
        rows.append(
            {
                **member.axes,
                "hash": member.scheme.hash,
                "key_bits": short(counted.keys),
                "value_bits": short(counted.values),
                "kl": [short(one.kl) for one in lost.windows],
                "nll": [short(one.nll) for one in lost.windows],
                "same": [short(one.same) for one in lost.windows],
                "score_error": short(layers.mean_score),
                "output_error": short(layers.mean_output),
            }
        )
    first = found.results[0].tasks.perplexity
    assert first is not None
    about = {
        "model": model.name, "digest": model.digest, "dtype": model.dtype, "layers": model.layers,
        "head_dim": model.head_dim, "kv_heads": model.kv_heads, "q_heads": model.q_heads,
        "text": text.name, "sha256": text.sha256, "versions": found.versions, "backend": found.results[0].backend,
    }  # fmt: skip
    names = ("seed", "windows", "context", "score", "chunk", "calibration", "queries")
    return {
        "about": about,
        "settings": {name: getattr(Settings(**found.settings), name) for name in names},
        "starts": [one.start for one in first.windows],
        "full_nll": [short(one.full_nll) for one in first.windows],
        "members": rows,
    }


def short(number: float | None) -> float | None:
    """Enough digits to be compared, few enough to be kept."""
    return None if number is None else float(f"{number:.{DIGITS}g}")


def read() -> dict[str, Any]:
    """What was measured before."""
    return dict(json.loads(FIGURES.read_text(encoding="utf-8"))) if FIGURES.is_file() else {}


def written(figures: Mapping[str, Any]) -> str:
    """The file: a line a member, so that a change shows where it is."""
    lines = []
    for name in sorted(figures):
        part = dict(figures[name])
        rows = part.pop("members", None)
        head = json.dumps(part, sort_keys=True)
        if rows is not None:
            each = ",\n".join(f"   {json.dumps(row)}" for row in rows)
            head = head[:-1] + f', "members": [\n{each}\n  ]}}'
        lines.append(f" {json.dumps(name)}: {head}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    every = [*COUNTS, *MEMBERS]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(every)}; default all")
    parser.add_argument("--page", action="store_true", help="print the page, and measure nothing")
    given = parser.parse_args()
    if wrong := [name for name in given.names if name not in every]:
        parser.error(f"{wrong[0]!r} is no question; there are {', '.join(every)}")
    if given.page:
        print(page(read()), end="")
        return
    torch.set_num_threads(1)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    chosen = given.names or every
    for name in chosen:
        if name in COUNTS:
            found = COUNTS[name](say)
        else:
            members = list(MEMBERS[name]())
            found = asked(members, "smollm2", SETTINGS.get(name, USUAL), out=ROWS / name, say=say)
        FIGURES.write_text(written({**read(), name: found}), encoding="utf-8")


if __name__ == "__main__":
    main()
