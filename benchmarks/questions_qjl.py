"""The first section of docs/questions.md: sketches of keys beside what else takes as many bits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from questions_members import (
    APART,
    BOTH,
    CHANNEL,
    EVEN,
    FAST,
    GAUSSIAN,
    NORMAL,
    NORMAL_VALUES,
    OF_VALUES,
    ORTHOGONAL,
    QUAROT,
    TOKEN,
    TOKEN_VALUES,
)
from questions_tables import Measure, Question, kl, mean, number, over_seeds, perplexity, score

from kvdsl.codegen.answer import table_of

FAMILIES = (GAUSSIAN, ORTHOGONAL, FAST, EVEN, NORMAL, TOKEN, CHANNEL, QUAROT)
SKETCHES = (GAUSSIAN, ORTHOGONAL)
STEPS = range(1, 9)


def grid(question: Question, measure: Measure, families: Sequence[str] = FAMILIES) -> str:
    """A row a number of bits, a column a family."""
    rows = [
        [str(bits), *(over_seeds(question.rows(family=family, bits=bits), measure) for family in families)]
        for bits in STEPS
    ]
    return table_of(("bits of codes", *families), rows)


def cheapest(question: Question, family: str, target: float) -> int | None:
    """The fewest bits of codes with which a family loses no more than `target` nats; None where none do."""
    for bits in STEPS:
        rows = question.rows(family=family, bits=bits)
        if rows and mean(rows, kl) <= target:
            return bits
    return None


def of_studies(found: Mapping[str, Any]) -> str:
    """The table of errors at head_dim 128."""
    families = [family for family in FAMILIES if family != FAST]
    known = {(row["family"], row["bits"]): row["score_error"] for row in found["rows"]}

    def cell(family: str, bits: int) -> str:
        if (one := known.get((family, bits))) is None:
            return ""
        return number(one["mean"]) + (f" ± {number(one['std'])}" if one["std"] else "")

    return table_of(("bits of codes", *families), [[str(b), *(cell(f, b) for f in families)] for b in STEPS])


def of_operations(dims: Sequence[int] = (64, 128), rows: Sequence[int] = (1, 2, 4, 8)) -> str:
    """What has to be done, whoever does it."""
    lines = list[tuple[str, tuple[int, ...]]]()
    for d in dims:
        log = int(math.log2(d))
        for m in rows:
            name = f"sketch, {m} row{'s' * (m > 1)} a channel"
            lines.append((name, (d, m * d * d, m * d * log, m * d * d, m * d)))
        lines += [("Hadamard rotation", (d, d * log, d * log, d * log, d)), ("plain", (d, d, d, 0, d))]
    head = ("keys", "head_dim", "encode a key", "with rows by sums", "turn a query, once a step", "score of a key")
    return table_of(head, [[name, *(f"{value:,}" for value in values)] for name, values in lines])


def decoding(found: Mapping[str, Any], row: Mapping[str, Any]) -> float:
    """Instructions of decode's loop for a number of a key, without half of what float16 on both sides takes."""
    exact = next(row for row in found["rows"] if row["family"] == "float16")
    return float((row["loop"] - exact["loop"] / 2) / found["shape"][0])


def of_code(found: Mapping[str, Any]) -> str:
    """What machine code of the generated kernels does."""
    lines = []
    exact = next(row for row in found["rows"] if row["family"] == "float16")
    for row in found["rows"]:
        lines.append(
            [
                row["family"],
                str(row["bits"]),
                number(row["turn"]) if "turn" in row else "",
                number(row["pack"]) if row.get("pack") else "",
                f"{decoding(found, row):.2f}",
                f"{row['products'] - exact['products'] / 2:.2f}",
                f"{row['share']:.0%}",
            ]  # fmt: skip
        )
    head = ("keys", "bits of codes", "map", "pack", "decode", "products", "share")
    return table_of(head, lines)


def of_accounts(found: Mapping[str, Any], matrices: Mapping[str, Any]) -> str:
    """Bits a number of a key, and bytes of the matrix in memory."""
    size = {(row["rows"], row["head_dim"]): row["bytes"] for row in matrices["matrices"]}
    lines = []
    for row in found["sketches"]:
        if row["rows"] not in (1, 2, 4, 8):
            continue
        place = row["rows"], row["head_dim"]
        total = row["code"] + row["metadata"] + row["padding"]
        held = f"{size[place] // 1024} KiB" if row["family"] == ORTHOGONAL else ""
        cells = [f"{row['code']:g}", f"{row['metadata']:g}", f"{total:g}", held]
        lines.append([row["family"], str(row["rows"]), str(row["head_dim"]), *cells])
    head = ("keys", "rows a channel", "head_dim", "signs", "norms and places", "bits a number", "matrix in memory")
    return table_of(head, lines)


def of_sides(question: Question) -> str:
    """Sketches of values, and of both sides."""
    lines = []
    for family, title in (
        (OF_VALUES, "values alone, sketch"), (NORMAL_VALUES, "values alone, Hadamard, normal levels"),
        (TOKEN_VALUES, "values alone, even levels a token"),
        (ORTHOGONAL, "keys alone, sketch"), (BOTH, "both, sketch"),
    ):  # fmt: skip
        for bits in (1, 2, 4, 8):
            if rows := question.rows(family=family, bits=bits):
                cells = [over_seeds(rows, measure) for measure in (kl, perplexity, output)]
                lines.append([title, str(bits), *cells])
    return table_of(("coded", "bits of codes", "KL", "perplexity", "error of outputs"), lines)


def output(row: Mapping[str, Any]) -> float:
    """Relative error of attention's outputs, mean over layers and heads."""
    return float(row["output_error"])


def of_channels_apart(question: Question) -> str:
    """Outlier channels sketched apart, beside one sketch of as many bits."""
    lines = []
    for bits in range(1, 5):
        rows = question.rows(family=APART, bits=bits)
        plain = question.rows(family=ORTHOGONAL, bits=2 * bits)
        cells = [over_seeds(rows, measure) for measure in (kl, perplexity, score)]
        beside = [over_seeds(plain, measure) for measure in (kl, score)]
        lines.append([f"{rows[0]['key_bits']:.3f}", *cells, f"{plain[0]['key_bits']:.3f}", *beside])
    head = ("bits, apart", "KL", "perplexity", "score error", "bits, one sketch", "its KL", "its score error")
    return table_of(head, lines, left=0)
