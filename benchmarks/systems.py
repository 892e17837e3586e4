"""`python benchmarks/systems.py [NAME...] [--out FOLDER]`: a page of Markdown for every shipped scheme, docs/systems/.

What it stores, its bits, the algebra as it is lowered and the main loop of the kernel that is generated, all of it by
the compiler: pages are made where a site is built from them, and are not kept beside the code they would lag behind.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from quality import kept

from kvdsl.codegen.answer import row as markdown_row
from kvdsl.codegen.answer import table_of
from kvdsl.codegen.listing import rows
from kvdsl.codegen.show import View, main_loop, show
from kvdsl.evaluation.results import Evaluation
from kvdsl.evaluation.tables import Sheet, losses
from kvdsl.rules import shape_faults
from kvdsl.scheme import Scheme
from kvdsl.schemes import ALL
from kvdsl.shape import usual

ROOT = Path(__file__).resolve().parent.parent
LINES = 80  # of a loop, which for some schemes has several hundred
MADE = "Made by `python benchmarks/systems.py`; not written by hand."


def fenced(lines: Sequence[str] | str, language: str = "text") -> str:
    """Lines as a block of code."""
    body = lines if isinstance(lines, str) else "\n".join(lines)
    return f"```{language}\n{body.rstrip()}\n```"


def page(name: str, scheme: Scheme, row: dict[str, Any]) -> str:
    """The page of one scheme: `row` as `kvdsl list` has it."""
    shape = usual(scheme)
    if shape_faults(scheme, shape):
        raise ValueError(f"{name}: it does not fit {shape!r}, for which its page is made")
    view = View(name, scheme, shape)
    bits = ", ".join(f"{side} {row['bits'][side]:.3f}" for side in ("keys", "values", "mean"))
    parts = [
        f"# {name}",
        MADE,
        f"{row['system']}; {row['source']}. Bits an element at head_dim {shape.head_dim}: {bits}.",
        *_of_its_file(scheme),
        *_measured(name),
        "## Spec",
        fenced(show(view, "scheme")[1]),
        "## Bits",
        fenced(show(view, "cost")[1]),
        "## Algebra",
        "Where each factor of a decoded number is applied, and what proves it.",
        fenced(show(view, "normal-form")[1]),
        "## Kernel",
        f"The main loop of attention in decode, as generated for `{shape!r}`.",
        f"`kvdsl emit {name} --out DIR` writes all of the text.",
        *_loops(show(view, "source")[0]),
    ]
    return "\n\n".join(parts) + "\n"


def _of_its_file(scheme: Scheme) -> list[str]:
    """What the scheme's file says of the method: its formulas, and what the paper has beyond it."""
    for path in sorted((ROOT / "schemes").glob("*.py")):
        module = importlib.import_module(f"kvdsl.schemes.{path.stem}") if path.stem != "__init__" else None
        if module is not None and any(value is scheme for value in vars(module).values()):
            return [f"## Method\n\nFrom `schemes/{path.name}`:", fenced(module.__doc__ or "")]
    return []


@cache
def _kept() -> tuple[Evaluation, Sheet]:
    """All that docs/quality.md is made of, and its table."""
    found = kept("all")
    return found, losses(found)


def _measured(name: str) -> list[str]:
    """What a model lost through it, as docs/quality.md has it."""
    found, sheet = _kept()
    known = {row[0]: row for row in sheet.rows}
    if name not in known:
        return ["## Measured quality", f"None: it does not fit {found.model}, see [all schemes](../quality.md)."]
    lines = list(zip(sheet.heads, known["full precision"], known[name], strict=True))
    told = table_of(("", *lines[0][1:]), lines[1:])
    return ["## Measured quality", f"On {found.model}, see [all schemes](../quality.md).", told]


def _loops(source: dict[str, Any]) -> list[str]:
    """The loop of a text, or of every tier's."""
    if "text" in source:
        return [_excerpt(main_loop(source["text"]))]
    return [part for place, own in source.items() for part in (f"Of {place}:", _excerpt(main_loop(own["text"])))]


def _excerpt(loop: str) -> str:
    lines = loop.split("\n")
    more = len(lines) - LINES
    return fenced(lines if more <= 0 else [*lines[:LINES], f"    # and {more} lines more"], "python")


def index(listed: Sequence[dict[str, Any]]) -> str:
    """The page that leads to the others."""
    lines = ["# Schemes", "", MADE, "", "| scheme | system | keys | values | mean | source |"]
    lines.append("| --- | --- | ---: | ---: | ---: | --- |")
    for row in listed:
        bits = (f"{row['bits'][side]:.3f}" for side in ("keys", "values", "mean"))
        lines.append(markdown_row([f"[{row['name']}]({row['name']}.md)", row["system"], *bits, row["source"]]))
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="default all")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "systems", metavar="FOLDER")
    given = parser.parse_args()
    if wrong := [name for name in given.names if name not in ALL]:
        parser.error(f"{wrong[0]!r} is no shipped scheme; `kvdsl list` has all")
    listed = [row for row in rows() if row["name"] in (given.names or ALL)]
    given.out.mkdir(parents=True, exist_ok=True)
    for row in listed:
        text = page(row["name"], ALL[row["name"]], row)
        (given.out / f"{row['name']}.md").write_text(text, encoding="utf-8")
    (given.out / "index.md").write_text(index(listed), encoding="utf-8")
    print(f"pages of {len(listed)} schemes: {given.out}")


if __name__ == "__main__":
    main()
