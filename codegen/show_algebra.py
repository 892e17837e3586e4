"""The normal form as a person reads it: definition, terms, where each factor is applied, and what proves it."""

from __future__ import annotations

from typing import Any

import sympy as sp

from .algebra import NormalForm, ProofStep, Term
from .header import alphabet_lines, applied, query_line
from .placement import When
from .plan import Plan, SidePlan

LEGEND = (
    "t token, d channel, b block of tokens, g group of channels",
    "c code, l level, s stored scale, z stored minimum or zero point; q query, p softmax weight",
)
Stage = tuple[dict[str, Any], list[str]]


def normal_form(plan: Plan) -> Stage:
    """(data, lines) of both sides of a plan."""
    data, lines = dict[str, Any](), [*LEGEND]
    for side in plan.terms:
        told = _side(side)
        data[side.path] = told
        lines += ["", *_lines(side, told)]
    if plan.queries is not None:
        data["queries"] = query_line(plan)
        lines += ["", query_line(plan)]
    return data, lines


def _side(side: SidePlan) -> dict[str, Any]:
    form, absorbed = side.form, side.absorbed if not (side.band and side.depth) else None  # bands share one space
    steps = [*form.proof]
    if absorbed is not None:
        steps.append(ProofStep(absorbed.statement, absorbed.method))
    return {
        "space": [] if absorbed is None else [*absorbed.steps, absorbed.read, absorbed.where],
        "definition": f"{_name(side)} = {_definition(side)}",
        "lowered": f"{_outcome(side)} = {_joined([_sum(form, term) for term in form.terms])}",
        "numbers": alphabet_lines(side),
        "applied": applied(side),
        "terms": [_term(side, term) for term in form.terms],
        "proof": [{"statement": step.statement, "method": step.method} for step in steps],
    }


def _name(side: SidePlan) -> str:
    return "y[t, d]" if side.turned and (side.stretch or not side.band) else f"{side.number}[t, d]"


def _definition(side: SidePlan) -> str:
    return f"the number itself, as {side.floats}" if side.floats else sp.sstr(side.form.definition)


def _outcome(side: SidePlan) -> str:
    if side.hoisted:
        return "q' . y[t]" if side.name == "keys" else "out'[d]"
    return f"q . {side.number}[t]" if side.name == "keys" else "out[d]"


def _sum(form: NormalForm, term: Term) -> str:
    """One term with its sum: what stands before it has left the sum."""
    over, inner, outer = _factors(form, term)
    number = f"*{'x' if form.when is When.IN_LOOP else form.letter}[t, d]" if term.coded else ""
    summed = f"sum_{over} {sp.sstr(inner)}{number}".replace(" 1*", " ")
    whole = summed if outer == 1 else f"{sp.sstr(outer)} * {summed}"
    return f"sum_{form.over} {whole}" if form.over else whole


def _joined(terms: list[str]) -> str:
    return " + ".join(terms).replace("+ -", "- ")


def _factors(form: NormalForm, term: Term) -> tuple[str, sp.Expr, sp.Expr]:
    """(the summed index, the factor inside the sum, the factor outside)."""
    if form.side == "keys":
        return "d", term.channel_factor, term.token_factor
    return "t", term.token_factor, term.channel_factor


def _term(side: SidePlan, term: Term) -> dict[str, str]:
    form = side.form
    _, inner, outer = _factors(form, term)
    return {
        "sum": _sum(form, term),
        "inside": sp.sstr(inner),
        "outside": sp.sstr(outer),
        "where": _where(side, term),
    }


def _where(side: SidePlan, term: Term) -> str:
    """What happens to each factor of a term, in words."""
    form = side.form
    _, inner, outer = _factors(form, term)
    if side.floats and not side.band:
        return "nothing is scaled"
    if side.factors:
        if side.name == "keys":
            return "the query meets the block's vectors once a tile, what that gives meets the numbers of each token"
        return "the weights meet the numbers of each token, what that gives meets the block's vectors once a tile"
    if side.slots:
        what, them = ("the query", "channels") if side.name == "keys" else ("the weights", "tokens")
        turned = ", turned back by the position of each token," if side.rope is not None else ""
        return f"{what}{turned} gathered at the {them} m, times what stands there"
    if side.beside:
        times = " times their scales" if side.beside.below else ""
        return f"the query gathered at the channels m{times}, once per tile, times what stands there"
    if form.when is When.IN_LOOP:
        again = ", mapped back" if side.mixed else ""
        again += ", and turned back to its position" if side.rope is not None else ""
        again = ", radius and angle become two channels" if side.polar else again
        again = ", radii and angles become channels" if side.band and side.polar else again
        return f"the number is decoded in the loop{again}, before the dot product"
    said = []
    carrier, target = ("the query", "the dot product") if side.name == "keys" else ("the weights", "the output")
    own = sp.IndexedBase("q") if side.name == "keys" else sp.IndexedBase("p")
    scaled = [part for part in sp.Mul.make_args(inner) if not part.has(own) and not part.is_number]
    if scaled:
        often = _often(form.when, side.name, inside=True)
        said.append(f"{_product(scaled)} is multiplied onto {carrier}, {often}")
    if outer != 1:
        often = _often(form.when, side.name, inside=False)
        if (across := side.layout.across) is not None:
            often = "once per token" if across.of_tokens else "once per tile of tokens that share it"
        said.append(f"{sp.sstr(outer)} is applied behind {target}, {often}")
    if not term.coded:
        said.append(f"made of {carrier} alone, no code is read")
    plain = "the levels" if form.letter == "l" else "the codes"
    return "; ".join(said) or f"{plain} go into the dot product as they are"


def _often(when: When, side: str, *, inside: bool) -> str:
    if when is When.AFTER_DOT:
        return "once per token and channel group"
    if when is When.ONCE_PER_TILE:
        return "once per tile of tokens that share it"
    if side == "keys":
        return "once per query" if inside else "once per token"
    return "once per token" if inside else "once per output"


def _product(parts: list[sp.Expr]) -> str:
    return sp.sstr(sp.Mul(*parts))


def _lines(side: SidePlan, told: dict[str, Any]) -> list[str]:
    lines = [side.title, *(f"  space        {line}" for line in told["space"])]
    lines.append(f"  definition   {told['definition']}")
    lines += [f"               {line}" for line in told["numbers"]]
    lines.append(f"  lowered      {told['lowered']}")
    lines.append(f"  scale        {told['applied']}")
    for number, term in enumerate(told["terms"], 1):
        lines += [f"  term {number}       {term['sum']}", f"               {term['where']}"]
    for step in told["proof"]:
        lines.append(f"  proof        {step['statement']}   [{step['method']}]")
    return lines
