"""The heading of every generated file: scheme, formulas, page, cost.  Nothing that varies between runs."""

from __future__ import annotations

import textwrap

import sympy as sp

from kvdsl import cost
from kvdsl.codes import Additive, width

from .placement import When
from .plan import Plan, SidePlan

FORMAT = 2  # of the generated text; a change of it makes every stored file stale


def formula_lines(side: SidePlan) -> list[str]:
    """The definition of one side as declared, and as lowered."""
    if side.band and side.absorbed is not None:
        lines = [f"{side.name}: {step}" for step in side.absorbed.steps]
        lines += [side.absorbed.read, side.absorbed.where]
        if side.stretch:
            return lines + [line for term in side.terms for line in (f"{term.title}:", *_coded_lines(term, "y"))]
        return lines + [line for term in side.terms for line in _number_lines(term, term.number)]
    return [line for term in side.terms for line in _term_lines(side, term)]


def _term_lines(whole: SidePlan, side: SidePlan) -> list[str]:
    lines = []
    if (held := side.beside) is not None:
        what = "the bits above those" if held.below else "what they leave"
        lines.append(
            f"{side.title}: o[t, d] = {what} of k[t, d] in {held.count} channels, 0 in the others; both are added up"
        )
    elif side.outliers and not side.masked:
        lines.append(f"{side.title}: o[t, d] = {whole.number}[t, d] of these, 0 of the others; both are added up")
    elif side.stretch:
        lines.append(f"{side.title}:" + " scores are added up" * (side.name == "keys"))
    elif side.shared:
        lines.append(f"values: the first {side.dim} channels of the keys, read where they stand")
    elif side.depth and not side.masked:
        lines.append(f"{side.title}: r[t, d] = {whole.number}[t, d] - all that is decoded before it; both are added up")
    if side.absorbed is not None:
        coded = _coded_lines(side, "y")
        read = f"{side.absorbed.read}; {side.absorbed.where}"
        coded += [side.absorbed.statement] if side.masked and side.depth else []
        return lines + [f"{side.title}: {step}" for step in side.absorbed.steps] + [read, *coded]
    return lines + _coded_lines(side, side.number)


def _coded_lines(side: SidePlan, letter: str) -> list[str]:
    lines = _number_lines(side, letter)
    if side.floats:
        return lines
    names = (f"q . {side.number}[t]  = ", "out[d]    = ") if not side.hoisted else ("q' . y[t] = ", "out'[d]   = ")
    outer = names[side.name == "values"]
    over = "d" if side.name == "keys" else "t"
    if side.when is When.IN_LOOP:
        return [
            *lines,
            f"{outer}sum_{over} {'q[d]' if over == 'd' else 'p[t]'}*{side.number}[t, d], decoded in the loop",
        ]
    texts = []
    for term in side.form.terms:
        inner, out = (
            (term.channel_factor, term.token_factor) if over == "d" else (term.token_factor, term.channel_factor)
        )
        tail = f"*{side.form.letter}[t, d]" if term.coded else ""
        front = "" if out == 1 else f"{sp.sstr(out)} * "
        ranks = f"sum_{side.form.over} " if side.form.over else ""
        texts.append(f"{ranks}{front}sum_{over} {sp.sstr(inner)}{tail}")
    return [*lines, outer + " + ".join(texts).replace("+ -", "- "), f"           {applied(side)}"]


def query_line(plan: Plan) -> str:
    """What packed keys meet where queries are rounded."""
    met = "q'" if plan.keys.mapped else "q"
    return f"queries: packed keys meet {met} as {plan.scheme.queries!r} reads it, exact ones q itself"


def applied(side: SidePlan) -> str:
    """Where the scale of a term is applied."""
    if side.beside is not None and side.beside.below:
        return "that of the channel among all, once per tile of tokens that share it"
    return side.when.value


def _number_lines(side: SidePlan, letter: str) -> list[str]:
    """What a decoded number is."""
    if side.floats:
        return [f"{letter}[t, d] = the number itself, as {side.floats}"]
    told = (f"           {line}" for line in alphabet_lines(side))
    return [f"{letter}[t, d] = {sp.sstr(side.form.definition)}", *told]


def alphabet_lines(side: SidePlan) -> list[str]:
    """What a code stands for, where it is no whole number; what a stored scale is multiplied by."""
    alphabet, lines = side.alphabet, []
    if factors := side.factors:
        lines.append(f"a[t, j], u[b, j, d] fp16; {factors.tokens} tokens share {factors.rank} vectors u[b, j]")
    if slots := side.slots:
        which = "n[t, i] fp16 at channel m[t, i]" if side.name == "keys" else "n[i, d] fp16 at token m[i, d] of each 64"
        lines.append(f"{which}, {slots.count} slots i")
    if held := side.beside:
        kept = f"the {held.bits} bits above c" if held.below else "fp16"
        lines.append(
            f"n[t, i] {kept} at channel m[b, i], {held.count} of them chosen every {side.choice.tokens} tokens"
        )
    if side.raised is not None:
        lines.append(f"c of chosen channels the lowest {alphabet.bits} of {width(side.raised.code)} bits")
    elif side.parted is not None and not side.masked:
        lines.append("c of chosen channels that of 0")
    if alphabet.small is not None:
        lines.append(f"l[t, d] = the number whose {alphabet.bits} bits are stored, {alphabet.small.name}")
    elif alphabet.vectors:
        size = side.layout.coupled
        lines.append(f"l[t, d] = number d % {size} of vector c[t, d // {size}] of the table of these {size} channels")
    elif isinstance(side.store.code, Additive):
        code = side.store.code.of(side.dim)
        turned = ", every other one turned by a quarter" * code.commuting
        lines.append(f"l[t, d] = the sum of numbers d of {code.codes} vectors, those of the codes c of t{turned}")
    elif alphabet.given:
        others = ", not those that numbers are compared with" * alphabet.matched
        lines.append(f"l[t, d] = one of {alphabet.count} calibrated levels{others}")
    elif alphabet.looked_up:
        levels = ", ".join(f"{level:.9g}" for level in alphabet.levels[: alphabet.count])
        lines += textwrap.wrap(f"l[t, d] = level c of {levels}", 96, subsequent_indent="    ")
    if side.second is not None:
        of = "each kv head" if side.second.block.heads == 1 else "the layer"
        lines.append(f"s = the stored scale times that of {of}")
    return lines


def page_lines(plan: Plan) -> list[str]:
    """The page, section by section, in bytes."""
    layout = plan.layout
    lines = [f"page: {layout.page_tokens} tokens of {layout.kv_heads} kv heads, {layout.page_bytes} bytes"]
    lines[0] += f" ({layout.head_bytes} a head)"
    for side in plan.stored:
        part = side.layout
        if side.floats:
            numbers = side.dim if side.band else layout.head_dim
            lines.append(f"  {part.float_offset:6d}  {side.title}: {side.floats} rows of {numbers}")
        if side.factors:
            lines.append(f"  {side.factors.offset:6d}  {side.title}: {side.factors.rank} fp16 rows of all tokens")
        if slots := side.slots:
            lines.append(f"  {slots.offset:6d}  {side.title}: {slots.rows} rows of {slots.width} fp16")
        if beside := side.beside:
            lines.append(f"  {beside.offset:6d}  {side.title}: {beside.rows_of(layout.page_tokens)}")
        for stream in part.streams:
            rows = "tokens t and t + 32 share a word" if stream.paired else "one token a row"
            planes = f"{part.plane_width} bytes of 5 ternary digits" if stream.digits else ""
            codes = f"codes of {part.coupled} channels" if part.coupled > 1 else "channels"
            planes = f"{part.row} bytes of codes" if part.row else planes
            planes = planes or f"{stream.width}-bit planes of {part.plane_width} {codes}"
            lines.append(f"  {stream.offset:6d}  {side.title}: {planes}, {rows}")
    for side in plan.stored:
        if held := side.factors:
            vectors = f"{held.blocks} x {held.rank} vectors of {side.dim} fp16"
            lines.append(f"  {held.vectors_offset:6d}  {side.title}: {vectors}")
        if slots := side.slots:
            lines.append(f"  {slots.places_offset:6d}  {side.title}: {slots.rows} rows of {slots.width} places")
        meta = side.layout.meta
        if meta is not None:
            what = {
                "byte": "scales of a byte",
                "bytes": "scale and offset bytes",
                "half": "scales",
                "halves": "scale and offset words",
                "word": "scale words",
                "words": "scales, then offsets",
            }
            where = "after the heads" if meta.shared else ""
            lines.append(f"  {meta.offset:6d}  {side.title}: {meta.entries} {what[meta.kind]} {where}".rstrip())
        if across := side.layout.across:
            each = "one a token" if across.of_tokens else f"one a channel for {across.tokens} tokens"
            lines.append(f"  {across.offset:6d}  {side.title}: {across.entries} fp16 factors of tiles, {each}")
        if chosen := side.chosen:
            which = f"{chosen.blocks} x {chosen.count} channels, those of {chosen.tokens} tokens"
            lines.append(f"  {chosen.offset:6d}  {side.title}: {which}")
    return lines


def heading(plan: Plan, name: str) -> str:
    """The module docstring."""
    scheme, shape = plan.scheme, plan.shape
    bits = cost.bits(scheme, head_dim=shape.head_dim, kv_heads=shape.kv_heads)
    spec = textwrap.wrap(repr(scheme), 108, subsequent_indent="    ", break_long_words=False)
    lines = [f"{name}: attention over a KV cache of {bits.mean:g} bits an element.", "", *spec, ""]
    for side in (plan.keys, plan.values):
        lines += formula_lines(side)
    lines += textwrap.wrap(query_line(plan), 108, subsequent_indent="    ") if plan.queries is not None else []
    lines += ["", *page_lines(plan), ""]
    lines.append(
        f"head_dim {shape.head_dim}, {shape.kv_heads} kv heads, {shape.q_heads} query heads, {shape.dtype} in and out"
    )
    lines.append(f"Made by kvdsl from scheme {scheme.hash}; do not edit.  Text format {FORMAT}.")
    body = "\n".join(line.rstrip() for line in lines).replace("\\", "/").replace('"""', "'''")
    return f'"""{body}\n"""\n'
