"""Single figures that sentences of docs/questions.md have in them, by the names they have there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from questions_members import CHANNELS, FITTED, HALF, HALF_FITTED, LAYOUTS, MIDDLE, SIGN, TOKENS, TUNED, TWO_BITS
from questions_tables import Question, kl, number

from kvdsl.cost import bits
from kvdsl.registry import load

SPENT = ("qjl", "kvtuner", "skvq_k2v1p5", "kitty", "vllm_k8v4", "vllm_k3v4_nc", "kivi2", "quarot4", "turboquant3")
"""Shipped schemes that say which side gets more, and some that give both the same."""


def of_kivi(question: Question, found: Mapping[str, Any]) -> dict[str, str]:
    """Of groups and windows."""
    lost = {(row["bits"], row["group"]): kl(row) for row in question.members}
    facts = {f"kivi{width}_{group}": number(one) for (width, group), one in lost.items()}
    facts |= {f"kivi{width}_ratio": f"{lost[width, 128] / lost[width, 32]:.1f}" for width in (2, 4)}
    kept = {row["tokens"]: row for row in found["kivi"] if (row["bits"], row["group"], row["head_dim"]) == (2, 32, 128)}
    return facts | {f"window_{tokens}": f"{row['window']:.2f}" for tokens, row in kept.items() if tokens}


def of_ternary(question: Question) -> dict[str, str]:
    """Of rules and layouts."""
    short, long, channel = LAYOUTS
    names = {"half": HALF, "half_fitted": HALF_FITTED, "fitted": FITTED, "middle": MIDDLE, "tuned": TUNED}
    names |= {"sign": SIGN, "two": TWO_BITS}
    facts = {}
    for place, layout in {"short": short, "long": long, "channel": channel}.items():
        each = {name: kl(question.one(rule=rule, layout=layout)) for name, rule in names.items()}
        facts |= {f"{name}_{place}": number(one) for name, one in each.items()}
    rules = [row for row in question.rows(layout=channel) if "bit" not in row["rule"]]
    facts["rules_apart"] = f"{max(map(kl, rules)) / min(map(kl, rules)):.1f}"
    return facts


def of_sides(question: Question) -> dict[str, str]:
    """Of bits on either side."""
    facts = {}
    for place, layout in {"channel": CHANNELS, "token": TOKENS}.items():
        for width in (2, 3, 4):
            of_keys = kl(question.one(layout=layout, keys=width, values=16))
            of_values = kl(question.one(layout=CHANNELS, keys=16, values=width))
            facts[f"keys_{place}_{width}"] = number(of_keys)
            facts[f"values_{width}"] = number(of_values)
            facts[f"ratio_{place}_{width}"] = f"{of_keys / of_values:.1f}"
    both = kl(question.one(layout=CHANNELS, keys=2, values=2))
    apart = kl(question.one(layout=CHANNELS, keys=2, values=16)) + kl(question.one(layout=CHANNELS, keys=16, values=2))
    return facts | {"sides_both": number(both), "sides_sum": number(apart)}


def spent(head_dim: int = 128) -> list[list[str]]:
    """Bits of keys and of values of shipped schemes."""
    rows = []
    for name in SPENT:
        found = bits(load(name), head_dim)
        rows.append([f"`{name}`", f"{found.keys:.3f}", f"{found.values:.3f}"])
    return rows
