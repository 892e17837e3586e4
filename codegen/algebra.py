"""The normal form: what a decoded number depends on decides where each of its factors is applied.

A score is sum_d q[d] * x(t, d) and an output is sum_t p[t] * x(t, d).  x is affine in the code, so either is a sum
of terms (factor of the token) * (factor of the channel) * (code or 1).  A factor that does not vary along the summed
index leaves the sum: a token's scale goes behind the dot product, a channel's scale onto the query.  Each derivation
is proven: the terms, multiplied out, are the definition.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import sympy as sp

from kvdsl.codes import in_trits
from kvdsl.errors import ProofError
from kvdsl.scheme import Band, Chosen, LowRank, Sparse, Store, Uniform

from .alphabet import Alphabet, alphabet_of, prove
from .bijection import prove_digits
from .layout import widths
from .placement import When, centre

token, block, group, channel = (sp.Symbol(name, integer=True, nonnegative=True) for name in ("t", "b", "g", "d"))
query, weight = sp.IndexedBase("q")[channel], sp.IndexedBase("p")[token]
code, level = (sp.IndexedBase(name)[token, channel] for name in "cl")


Letter = Literal["c", "l"]


@dataclass(frozen=True)
class Term:
    """token_factor * channel_factor * (code or level, if `coded`), summed over channels (keys) or tokens (values)."""

    token_factor: sp.Expr
    channel_factor: sp.Expr
    coded: bool


@dataclass(frozen=True)
class ProofStep:
    """One statement, and how it was proven: "symbolic" or "exhaustive (n cases)"."""

    statement: str
    method: str


@dataclass(frozen=True)
class NormalForm:
    """One side of a scheme: its definition, its terms, and the proof that they agree.

    letter   what a product reads: c, the code, or l, the level that a code is looked up as
    over     the index that terms are summed over beside tokens or channels: of vectors of low rank
    """

    side: Literal["keys", "values"]
    when: When
    definition: sp.Expr
    terms: tuple[Term, ...]
    proof: tuple[ProofStep, ...]
    letter: Letter = "c"
    over: str = ""


def decoded(store: Store, alphabet: Alphabet, c: sp.Expr, s: sp.Expr, z: sp.Expr) -> sp.Expr:
    """The definition of a decoded number in its code c (of a looked-up alphabet: its level), stored scale s and stored
    offset (or zero point) z."""
    code_, scale = store.code, store.measure
    if scale is None:
        return c if alphabet.looked_up or not alphabet.levels else _exact(alphabet.first) + _exact(alphabet.step) * c
    if not isinstance(code_, Uniform):
        line = c if alphabet.looked_up else _exact(alphabet.first) + _exact(alphabet.step) * c
        return s * line + (z if scale.range in ("minmax", "minmax_zero") else 0)
    half = sp.Rational(1, 2) if code_.grid == "cells" else sp.Integer(0)
    if scale.range not in ("minmax", "minmax_zero"):
        return s * (c - centre(code_, scale) + half)
    if scale.zero == "min":
        return s * (c + half) + z
    return s * (c - z)


def _exact(number: Fraction) -> sp.Rational:
    return sp.Rational(number.numerator, number.denominator)


_INDICES = {
    When.NEVER: (),
    When.AFTER_DOT: (token, group),
    When.ONCE_PER_TILE: (block, channel),
    When.ONCE_PER_QUERY: (channel,),
    When.IN_LOOP: (token, channel),
}


def _split(factor: sp.Expr, coded: bool, when: When) -> Term:
    """Sort the factors of one product by the index they depend on; a step of levels goes with the scale."""
    with_channels = coded and when in (When.ONCE_PER_TILE, When.ONCE_PER_QUERY)
    of_token, of_channel = sp.Integer(1), sp.Integer(1)
    for part in sp.Mul.make_args(factor):
        if part in (code, level):
            continue
        depends = part.free_symbols & {token, channel}
        if depends == {token, channel}:
            raise ProofError(f"{part} depends on the token and the channel: it cannot leave the loop")
        if channel in depends or (with_channels and part.is_number):
            of_channel *= part
        else:
            of_token *= part
    return Term(of_token, of_channel, coded)


def derive(side: Literal["keys", "values"], store: Store, when: When, alphabet: Alphabet | None = None) -> NormalForm:
    """The normal form of one side whose scale is applied at `when`, with its proof.

    alphabet   how codes become numbers; None: as in blocks of 128 channels
    Raises ProofError where the terms do not give the definition back, or a factor cannot leave the loop.
    """
    if isinstance(store.code, LowRank):
        return _factored(side, store.code)
    if isinstance(store.code, Sparse):
        return _slotted(side, store.code, turned=store.rope is not None)
    if isinstance(store.code, Chosen):
        return _of_chosen(store.code)
    indices = _INDICES[when]
    stored = [sp.IndexedBase(name)[indices] if indices else sp.Integer(0) for name in ("s", "z")]
    alphabet = alphabet or alphabet_of(store, 128)
    number = level if alphabet.looked_up else code
    letter: Letter = "l" if alphabet.looked_up else "c"
    definition = decoded(store, alphabet, number, *stored)
    if store.balance is not None:
        across = sp.IndexedBase("f")
        definition = across[token] * definition if store.of_tokens else across[block, channel] * definition
    outside = query if side == "keys" else weight
    if when is When.IN_LOOP:
        # the decoded number itself is what the dot product reads
        whole = sp.IndexedBase("x")[token, channel]
        term = Term(sp.Integer(1), query, True) if side == "keys" else Term(weight, sp.Integer(1), True)
        number = "y[t, i] and y[t, i + D/2], with y[t, d]" if store.polar else str(whole)
        number = "its radius and its angles, each of them" if isinstance(store, Band) and store.polar else number
        made = f"{whole} made of {number}" if store.polar else number
        statement = f"{outside}*{whole} with {made} = {definition}, decoded before the dot product"
        step = ProofStep(statement, "by definition")
        return NormalForm(side, when, definition, (term,), (step, *alphabet_proof(alphabet)), letter)
    summand = sp.expand(outside * definition)
    terms = tuple(_split(product, product.has(number), when) for product in sp.Add.make_args(summand))
    back = sum(term.token_factor * term.channel_factor * (number if term.coded else 1) for term in terms)
    if sp.simplify(back - outside * definition) != 0:
        raise ProofError(f"{side}: the terms {terms} do not add up to {definition}")
    lowered = " + ".join(
        f"({sp.sstr(term.token_factor)})*({sp.sstr(term.channel_factor)})" + (f"*{letter}[t, d]" if term.coded else "")
        for term in terms
    )
    statement = f"{sp.sstr(outside)}*({sp.sstr(definition)}) = {lowered}"
    steps = (ProofStep(statement, "symbolic"), *alphabet_proof(alphabet), *planes_proof(store, alphabet))
    return NormalForm(side, when, definition, terms, steps, letter)


def _factored(side: Literal["keys", "values"], code: LowRank) -> NormalForm:
    """The normal form of vectors of low rank: a query meets the vectors, or weights meet the numbers, before the sum
    over ranks."""
    rank = sp.Symbol("j", integer=True, positive=True)
    number, vector = sp.IndexedBase("a"), sp.IndexedBase("u")
    definition = sp.Sum(number[token, rank] * vector[block, rank, channel], (rank, 1, code.rank))
    term = Term(number[token, rank], query * vector[block, rank, channel], False)
    if side == "values":
        term = Term(weight * number[token, rank], vector[block, rank, channel], False)
    ranks, tokens, channels = range(2), range(2), range(3)
    q, p = sp.symbols("q:3"), sp.symbols("p:2")
    decoded = {(t, d): sum(number[t, j] * vector[0, j, d] for j in ranks) for t in tokens for d in channels}
    if side == "keys":
        pairs = [
            (
                sum(q[d] * decoded[t, d] for d in channels),
                sum(number[t, j] * sum(q[d] * vector[0, j, d] for d in channels) for j in ranks),
            )
            for t in tokens
        ]
    else:
        pairs = [
            (
                sum(p[t] * decoded[t, d] for t in tokens),
                sum(sum(p[t] * number[t, j] for t in tokens) * vector[0, j, d] for j in ranks),
            )
            for d in channels
        ]
    if any(sp.expand(one - other) != 0 for one, other in pairs):
        raise ProofError(
            f"{side}: sums over ranks and over {'channels' if side == 'keys' else 'tokens'} do not commute"
        )
    swapped = (
        "q . x[t] = sum_j a[t, j] * (q . u[b, j])"
        if side == "keys"
        else "sum_t p[t]*x[t] = sum_j (sum_t p[t]*a[t, j]) * u[b, j]"
    )
    return NormalForm(side, When.NEVER, definition, (term,), (ProofStep(swapped, "symbolic"),), over="j")


def _slotted(side: Literal["keys", "values"], code: Sparse, *, turned: bool) -> NormalForm:
    """The normal form of single numbers: what they meet is gathered where they stand, instead of a sum over numbers
    most of which are 0.  `turned`: the query is turned back by the position of each token, before it is gathered."""
    slot = sp.Symbol("i", integer=True, positive=True)
    number, place = sp.IndexedBase("n"), sp.IndexedBase("m")
    if side == "keys":
        there = sp.KroneckerDelta(channel, place[token, slot])
        met = sp.IndexedBase("q")[token, channel] if turned else query
        term = Term(number[token, slot], met * there, False)
        definition = sp.Sum(number[token, slot] * there, (slot, 1, code.slots))
    else:
        there = sp.KroneckerDelta(token, place[slot, channel])
        term = Term(weight * there, number[slot, channel], False)
        definition = sp.Sum(number[slot, channel] * there, (slot, 1, code.slots))
    outer, numbers, cases = sp.symbols("q:4"), sp.symbols("n:2"), 0
    for places in itertools.product(range(4), repeat=2):
        whole = sum(outer[d] * sum(n for n, m in zip(numbers, places, strict=True) if m == d) for d in range(4))
        gathered = sum(n * outer[m] for n, m in zip(numbers, places, strict=True))
        if sp.expand(whole - gathered) != 0:
            raise ProofError(f"{side}: numbers at {places} are not gathered")
        cases += 1
    read = "q . x[t] = sum_i n[t, i]*q[t, m[t, i]]" if turned else "q . x[t] = sum_i n[t, i]*q[m[t, i]]"
    read = read if side == "keys" else "sum_t p[t]*x[t, d] = sum_i n[i, d]*p[m[i, d]]"
    proof = (ProofStep(read, f"exhaustive ({cases} cases)"),)
    return NormalForm(side, When.NEVER, definition, (term,), proof, over="i")


def _of_chosen(code: Chosen) -> NormalForm:
    """The normal form of numbers of channels that are chosen anew every few tokens: a query is gathered there once for
    these, and so are scales where the numbers are bits of codes above those that stand among the others'."""
    slot, number, place = sp.Symbol("i", integer=True, positive=True), sp.IndexedBase("n"), sp.IndexedBase("m")
    there = sp.KroneckerDelta(channel, place[block, slot])
    scale = 2**code.below * sp.IndexedBase("s")[block, channel] if code.below else sp.Integer(1)
    definition = sp.Sum(scale * number[token, slot] * there, (slot, 1, sp.Symbol("N", integer=True)))
    term = Term(number[token, slot], query * scale * there, False)
    outer, numbers = sp.symbols("q:4"), sp.symbols("n:2")
    scales = [2**code.below * s for s in sp.symbols("s:4")] if code.below else [sp.Integer(1)] * 4
    cases = tuple(itertools.permutations(range(4), 2))
    for places in cases:
        vector = [sum(scales[d] * n for n, m in zip(numbers, places, strict=True) if m == d) for d in range(4)]
        gathered = sum(n * (scales[m] * outer[m]) for n, m in zip(numbers, places, strict=True))
        if sp.expand(sum(q * x for q, x in zip(outer, vector, strict=True)) - gathered) != 0:
            raise ProofError(f"keys: numbers of channels {places} are not gathered")
    met = f"({2**code.below}*s[b, m[b, i]]*q[m[b, i]])" if code.below else "q[m[b, i]]"
    proof = [ProofStep(f"q . o[t] = sum_i n[t, i]*{met}", f"exhaustive ({len(cases)} cases)")]
    if code.below:
        bits = code.below + code.bits
        if any(c % 2**code.below + 2**code.below * (c >> code.below) != c for c in range(2**bits)):
            raise ProofError(f"keys: the lowest {code.below} bits and those above them are no code of {bits} bits")
        whole = f"code of {bits} bits = its lowest {code.below} + {2**code.below}*n"
        proof.append(ProofStep(whole, f"exhaustive ({2**bits} codes)"))
    return NormalForm("keys", When.NEVER, definition, (term,), tuple(proof), over="i")


def alphabet_proof(alphabet: Alphabet) -> tuple[ProofStep, ...]:
    """That what a product reads of a code is its level."""
    return tuple(ProofStep(*step) for step in prove(alphabet))


def clean_from_dirty(width: int, position: int, run: range) -> tuple[tuple[int, sp.Rational], ...]:
    """Plane `position` of a byte from dirty planes D_i = sum_(k in run, k<=i) c_k 2^(k width): ((i, factor), ...)."""
    scale = sp.Rational(1, 2 ** (position * width))
    return ((position, scale),) if position == run.start else ((position, scale), (position - 1, -scale))


def query_of_dirty(width: int, position: int, run: range) -> tuple[tuple[int, sp.Rational], ...]:
    """What multiplies dirty plane `position` of a byte: ((i, coefficient of the query of plane i), ...).

    The transpose of `clean_from_dirty`: the surplus of lower codes in a plane is taken off by the query of the next.
    `run` holds the positions of the byte that share a scale; a plane is read with the bits of its run below it.
    """
    taken = [(position, sp.Rational(1, 2 ** (position * width)))]
    if position + 1 in run:
        taken.append((position + 1, -sp.Rational(1, 2 ** ((position + 1) * width))))
    return tuple(taken)


def planes_proof(store: Store, alphabet: Alphabet | None = None) -> tuple[ProofStep, ...]:
    """Reading dirty planes with a changed query (or undoing them on the output) equals reading the codes."""
    alphabet = alphabet or alphabet_of(store, 128)
    if in_trits(store.code):
        statement = "digit j of a byte b = 3*(b*3^j mod 256) div 256"
        return (ProofStep(statement, f"exhaustive ({prove_digits()} bytes)"),)
    steps = []
    for width in () if alphabet.looked_up else widths(alphabet.bits):
        count = 8 // width
        for length in (size for size in (1, 2, 4, 8) if size <= count):
            for first in range(0, count, length):
                _prove_run(width, range(first, first + length))
        steps.append(ProofStep(f"dirty planes of {width} bits: sum q'_i D_i = sum q_i c_i, and back", "symbolic"))
    parts, rest = [], alphabet.bits
    if not rest:
        return ()
    for width in widths(alphabet.bits):
        rest -= width
        parts.append((width, rest))
    whole = 2**alphabet.bits
    if any(sum(((c >> shift) % 2**width) << shift for width, shift in parts) != c for c in range(whole)):
        raise ProofError(f"streams {parts} do not add up to a code of {alphabet.bits} bits")
    steps.append(
        ProofStep(" + ".join(f"2^{s}*({w} bits)" for w, s in parts) + " = code", f"exhaustive ({whole} cases)")
    )
    return tuple(steps)


def _prove_run(width: int, run: range) -> None:
    """The change of basis within one run of planes of a byte."""
    codes, outer = ({i: sp.Symbol(f"{name}{i}") for i in run} for name in "cq")
    dirty = {i: sum(codes[k] * 2 ** (k * width) for k in run if k <= i) for i in run}
    changed = {i: sum(outer[k] * a for k, a in query_of_dirty(width, i, run)) for i in run}
    score = sum(changed[i] * dirty[i] - outer[i] * codes[i] for i in run)
    undone = [sum(dirty[k] * a for k, a in clean_from_dirty(width, i, run)) - codes[i] for i in run]
    if sp.expand(score) != 0 or any(sp.expand(difference) != 0 for difference in undone):
        raise ProofError(f"the change of basis of {width}-bit planes {run} is wrong")
