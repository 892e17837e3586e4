"""Single figures that sentences of docs/questions.md have in them, by the names they have there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import questions_members as m
from questions_qjl import cheapest, decoding
from questions_tables import Question, Row, kl, mean, number, score, spread

from kvdsl.cost import bits
from kvdsl.registry import load

SPENT = ("qjl", "kvtuner", "skvq_k2v1p5", "kitty", "vllm_k8v4", "vllm_k3v4_nc", "kivi2", "quarot4", "turboquant3")
"""Shipped schemes that say which side gets more, and some that give both the same."""
LOOPS = {"": m.ORTHOGONAL, "_even": m.EVEN}


def of_kivi(question: Question, found: Mapping[str, Any]) -> dict[str, str]:
    """Of groups and windows."""
    lost = {(row["bits"], row["group"]): kl(row) for row in question.members}
    facts = {f"kivi{width}_{group}": number(one) for (width, group), one in lost.items()}
    facts |= {f"kivi{width}_ratio": f"{lost[width, 128] / lost[width, 32]:.1f}" for width in (2, 4)}
    kept = {row["tokens"]: row for row in found["kivi"] if (row["bits"], row["group"], row["head_dim"]) == (2, 32, 128)}
    return facts | {f"window_{tokens}": f"{row['window']:.2f}" for tokens, row in kept.items() if tokens}


def of_ternary(question: Question) -> dict[str, str]:
    """Of rules and layouts."""
    short, long, channel = m.LAYOUTS
    names = {"half": m.HALF, "half_fitted": m.HALF_FITTED, "fitted": m.FITTED, "middle": m.MIDDLE, "tuned": m.TUNED}
    names |= {"sign": m.SIGN, "two": m.TWO_BITS}
    facts = dict[str, str]()
    for place, layout in {"short": short, "long": long, "channel": channel}.items():
        each = {name: kl(question.one(rule=rule, layout=layout)) for name, rule in names.items()}
        facts |= {f"{name}_{place}": number(one) for name, one in each.items()}
    rules = [row for row in question.rows(layout=channel) if "bit" not in row["rule"]]
    facts["rules_apart"] = f"{max(map(kl, rules)) / min(map(kl, rules)):.1f}"
    return facts


def of_sides(question: Question) -> dict[str, str]:
    """Of bits on either side."""
    facts = dict[str, str]()
    for place, layout in {"channel": m.CHANNELS, "token": m.TOKENS}.items():
        for width in (2, 3, 4):
            of_keys = kl(question.one(layout=layout, keys=width, values=16))
            of_values = kl(question.one(layout=m.CHANNELS, keys=16, values=width))
            facts[f"keys_{place}_{width}"] = number(of_keys)
            facts[f"values_{width}"] = number(of_values)
            facts[f"ratio_{place}_{width}"] = f"{of_keys / of_values:.1f}"
    both, one, other = (
        kl(question.one(layout=m.CHANNELS, keys=of_keys, values=of_values))
        for of_keys, of_values in ((2, 2), (2, 16), (16, 2))
    )
    return facts | {"sides_both": number(both), "sides_sum": number(one + other)}


def spent(head_dim: int = 128) -> list[list[str]]:
    """Bits of keys and of values of shipped schemes."""
    rows = []
    for name in SPENT:
        found = bits(load(name), head_dim)
        rows.append([f"`{name}`", f"{found.keys:.3f}", f"{found.values:.3f}"])
    return rows


def of_sketches(question: Question, figures: Mapping[str, Any]) -> dict[str, str]:
    """Of sketches beside plain codes, of bits and machine code."""

    def of(family: str, width: int) -> list[Row]:
        return question.rows(family=family, bits=width)

    def lost(family: str, width: int) -> float:
        return mean(of(family, width), kl)

    def relative(family: str, width: int) -> str:
        return f"{spread(of(family, width), kl) / lost(family, width):.0%}"

    names = {"gaussian": m.GAUSSIAN, "orthogonal": m.ORTHOGONAL, "even": m.EVEN, "channel": m.CHANNEL, "token": m.TOKEN}
    facts = {f"{name}_{width}": number(lost(family, width)) for name, family in names.items() for width in (2, 4, 8)}
    facts |= {f"fast_{width}": number(lost(m.FAST, width)) for width in (2, 8)}
    facts |= {"gaussian_1": number(lost(m.GAUSSIAN, 1)), "normal_2": number(lost(m.NORMAL, 2))}
    facts |= {f"values_rows_{width}": number(lost(m.OF_VALUES, width)) for width in (1, 2, 4)}
    facts |= {f"normal_values_{width}": number(lost(m.NORMAL_VALUES, width)) for width in (1, 2, 4)}
    facts |= {f"apart_{width}": number(lost(m.APART, width)) for width in (1, 2)}
    facts |= {f"{name}_spread": relative(names[name], 4) for name in ("gaussian", "orthogonal", "even")}
    first = cheapest(question, m.ORTHOGONAL, lost(m.GAUSSIAN, 8))
    best = {name: cheapest(question, names[name], lost(m.ORTHOGONAL, 8)) for name in ("even", "channel", "token")}
    assert first is not None and best["even"] is not None
    errors = {(family, w): mean(of(family, w), score) for family in (m.ORTHOGONAL, m.EVEN) for w in (4, 8)}
    code = {(row["family"], row["bits"]): row for row in figures["code"]["rows"]}
    loops = {f"decode{name}_8": decoding(figures["code"], code[family, 8]) for name, family in LOOPS.items()}
    shipped = bits(load("qjl"))
    return facts | {
        **{name: f"{one:.2f}" for name, one in loops.items()},
        "spills_8": str(code[m.ORTHOGONAL, 8]["spills"]),
        "many": str(len(of(m.ORTHOGONAL, 4))),
        "few": str(len(of(m.EVEN, 4))),
        "head_bits": f"{of(m.ORTHOGONAL, 4)[0]['key_bits'] - 4:g}",
        "qjl_full": f"{question.full_perplexity:.2f}",
        "study_seeds": str(figures["numbers"]["seeds"]),
        "orthogonal_for_gaussian": str(first),
        "orthogonal_match": number(lost(m.ORTHOGONAL, first)),
        "orthogonal_1": number(lost(m.ORTHOGONAL, 1)),
        "normal_1": number(lost(m.NORMAL, 1)),
        **{f"{name}_for_orthogonal": str(one) for name, one in best.items()},
        **{f"{name}_match": number(lost(names[name], one)) for name, one in best.items() if one},
        "even_fall": f"{errors[m.EVEN, 4] / errors[m.EVEN, 8]:.0f}",
        "orthogonal_fall": f"{errors[m.ORTHOGONAL, 4] / errors[m.ORTHOGONAL, 8]:.1f}",
        "map_ratio": f"{code[m.ORTHOGONAL, 2]['turn'] / code[m.EVEN, 4]['turn']:.0f}",
        "norm_64": f"{16 / 64:g}",
        "norm_128": f"{16 / 128:g}",
        "qjl_keys": f"{shipped.keys:.3f}",
        "qjl_values": f"{shipped.values:.3f}",
    }
