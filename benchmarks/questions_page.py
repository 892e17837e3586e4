"""docs/questions.md, made of benchmarks/questions.json: tables, and what they say."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import questions_facts as facts
import questions_qjl as sketches
from questions_members import CHANNELS, LAYOUTS, RULES, TOKENS, WIDTHS
from questions_tables import Question, kl, number, perplexity, score, with_error, with_interval

from kvdsl.codegen.answer import table_of

ROOT = Path(__file__).resolve().parent.parent
ABLATIONS = ROOT / "docs" / "ablations.md"
WORDS = Path(__file__).resolve().parent / "questions.template.md"


def ablations() -> str:
    """Of every choice of ZipCache what loses least and most, out of the page that has them all."""
    rows = ablation_rows()
    lines = []
    for choice in dict.fromkeys(row[0] for row in rows if row[1]):
        own = [row for row in rows if row[0] == choice]
        least, most = min(own, key=lambda row: float(row[3])), max(own, key=lambda row: float(row[3]))
        lines.append([choice, str(len(own)), own[0][1], own[0][3], least[1], least[3], most[1], most[3]])
    head = ("choice", "tried", "ZipCache's own", "its KL", "loses least", "KL", "loses most", "KL")
    return table_of(head, lines)


def ablation_rows() -> list[list[str]]:
    """Cells of the table in docs/ablations.md."""
    lines = [line for line in ABLATIONS.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def kivi_bits(found: Mapping[str, Any], head_dim: int = 128) -> str:
    """Bits of KIVI by group and length."""
    lines = []
    for bits in (2, 4):
        for group in (32, 64, 128):
            own = {
                row["tokens"]: row
                for row in found["kivi"]
                if (row["bits"], row["group"], row["head_dim"]) == (bits, group, head_dim)
            }
            ends = own[None]
            totals = [sum(row[part] for part in ("code", "metadata", "padding", "window")) for row in own.values()]
            windows = [row["window"] for tokens, row in own.items() if tokens]
            cells = [f"{ends['code']:g}", f"{ends['metadata']:g}", *(f"{one:.3f}" for one in totals)]
            lines.append([str(bits), str(group), *cells, *(f"{one:.3f}" for one in windows)])
    head = (
        "bits", "group", "codes", "scale and least", "without end", "at 1k", "at 4k", "at 32k",
        "window's part at 1k", "at 4k", "at 32k",
    )  # fmt: skip
    return table_of(head, lines, left=0)


def kivi_quality(question: Question) -> str:
    """What the model loses by group."""
    lines = []
    for row in question.members:
        each = f"{row['key_bits']:g} / {row['value_bits']:g}"
        lost = (with_error(row), with_interval(question, row), number(row["score_error"]), number(row["output_error"]))
        lines.append([str(row["bits"]), str(row["group"]), each, *lost])
    head = ("bits", "group", "bits of keys / values", "KL", "perplexity", "score error", "error of outputs")
    return table_of(head, lines, left=0)


def digits(found: Mapping[str, Any]) -> str:
    """What five digits a byte come to."""
    lines = [
        [str(row["head_dim"]), f"{row['code']:.4g}", f"{row['code'] / math.log2(3) - 1:.1%}", f"{row['metadata']:g}"]
        for row in found["digits"]
    ]
    return table_of(("head_dim", "bits of a digit", "above log2 3", "one scale a token"), lines, left=0)


def rules(question: Question) -> str:
    """A row a rule, a column a layout."""
    lines = []
    for rule in RULES:
        each = [question.one(rule=rule, layout=layout) for layout in LAYOUTS]
        lines.append([rule, *(f"{row['key_bits']:g}: {with_error(row)}" for row in each)])
    return table_of(("rule", *LAYOUTS), lines)


def rule_errors(question: Question) -> str:
    """Perplexity, and errors of scores and outputs, in the last layout."""
    lines = []
    for rule in RULES:
        row = question.one(rule=rule, layout=LAYOUTS[-1])
        lost = (with_interval(question, row), number(row["score_error"]), number(row["output_error"]))
        lines.append([rule, *lost])
    return table_of(("rule", "perplexity", "score error", "error of outputs"), lines)


def side_grid(question: Question, layout: str) -> str:
    """A row for bits of keys, a column for bits of values."""
    lines = []
    for of_keys in WIDTHS:
        cells = [side(question, layout, of_keys, of_values) for of_values in WIDTHS]
        lines.append([str(of_keys), *("0" if one is None else with_error(one) for one in cells)])
    return table_of(("keys \\ values", *map(str, WIDTHS)), lines)


def side(question: Question, layout: str, of_keys: int, of_values: int) -> Mapping[str, Any] | None:
    """The member of a place; keys in full are the same in both layouts, and both sides in full lose nothing."""
    if of_keys == of_values == 16:
        return None
    return question.one(layout=CHANNELS if of_keys == 16 else layout, keys=of_keys, values=of_values)


def swapped(question: Question) -> str:
    """The same bits on one side and on the other."""
    lines = []
    for low, high in ((2, 3), (2, 4), (3, 4), (4, 8)):
        cells = [str((low + high) / 2 + 1), f"{high} and {low}"]
        for layout in (CHANNELS, TOKENS):
            more_keys, more_values = (side(question, layout, *pair) for pair in ((high, low), (low, high)))
            assert more_keys is not None and more_values is not None
            cells += [with_error(more_keys), with_error(more_values), number(kl(more_values) / kl(more_keys))]
        lines.append(cells)
    head = ["bits a number", "bits"]
    head += [f"{layout}: {what}" for layout in (CHANNELS, TOKENS) for what in ("more for keys", "for values", "ratio")]
    return table_of(head, lines, left=0)


def page(figures: Mapping[str, Any]) -> str:
    """All of it."""
    asked = {name: Question(figures[name]) for name in ("qjl", "kivi", "ternary", "sides")}
    command = "python benchmarks/questions.py"
    code = figures["code"]
    parts = {
        **{f"{name}_made": one.told(f"{command} {name}") for name, one in asked.items()},
        "ablations": ablations(),
        "kivi_bits": kivi_bits(figures["bits"]),
        "kivi_quality": kivi_quality(asked["kivi"]),
        "digits": digits(figures["bits"]),
        "rules": rules(asked["ternary"]),
        "rule_errors": rule_errors(asked["ternary"]),
        "side_channels": side_grid(asked["sides"], CHANNELS),
        "side_tokens": side_grid(asked["sides"], TOKENS),
        "swapped": swapped(asked["sides"]),
        "qjl_kl": sketches.grid(asked["qjl"], kl),
        "qjl_perplexity": sketches.grid(asked["qjl"], perplexity),
        "qjl_score": sketches.grid(asked["qjl"], score),
        "qjl_apart": sketches.of_channels_apart(asked["qjl"]),
        "qjl_studies": sketches.of_studies(figures["numbers"]),
        "qjl_operations": sketches.of_operations(),
        "qjl_code": sketches.of_code(code),
        "qjl_accounts": sketches.of_accounts(figures["bits"], figures["matrices"]),
        "qjl_sides": sketches.of_sides(asked["qjl"]),
        "triton": code["triton"],
        "head_dim": str(asked["qjl"].about["head_dim"]),
        "spent": table_of(("scheme", "keys", "values"), facts.spent()),
        **facts.of_kivi(asked["kivi"], figures["bits"]),
        **facts.of_ternary(asked["ternary"]),
        **facts.of_sides(asked["sides"]),
        **facts.of_sketches(asked["qjl"], figures),
    }
    return WORDS.read_text(encoding="utf-8").format(**parts)
