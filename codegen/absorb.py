"""How the map of a side's space is taken out of the loop: onto the query for keys, onto the output for values, proven.

What is coded of a vector x is y = E x - u; what is read is x = W y + v.  Scores and outputs are linear in x, so W and v
leave the sum over tokens: they are applied once to a query, or once to an output.

Rotary positions differ from token to token and stay in the loop.  Of R_t with t = t0 + i, t0 the first token of a tile,
R_t0 goes onto the query, once a tile, and R_i, the same in every tile, onto decoded numbers.  W, behind R_t, stays with
it, unless each number is one channel's: then its order and its factors still leave the loop.

Polar coordinates stay in the loop, too: a score is linear in r cos a and r sin a, which decoded r and a are made into.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import sympy as sp

from kvdsl.errors import ProofError
from kvdsl.scheme import (
    ALL,
    Balance,
    ChannelScale,
    ChannelShift,
    Eigenbasis,
    Parted,
    Permute,
    Pick,
    Polar,
    PreRope,
    Rotate,
    Sketch,
    Sparse,
    Store,
)

CHANNELS, NUMBERS, TOKENS = 3, 2, 2  # of the proof: the statement is linear in every factor


@dataclass(frozen=True)
class Absorbed:
    """One side's map: each step in words, what is read, what the side's sums become, and where the map is applied."""

    steps: tuple[str, ...]
    read: str
    statement: str
    method: str
    where: str


def steps(store: Store) -> tuple[str, ...]:
    """The chain of maps, in the order in which they are applied."""
    found = [_said(part) for part in store.transform]  # type: ignore[union-attr]
    if isinstance(store, Parted) and store.masked:
        top = store.choice
        count = f"{top.n}" if isinstance(top.n, int) else f"{100 * top.n:g} % of all"
        found.append(f"m[b], the {count} channels of largest {top.by} in the {top.tokens} tokens of block b")
        found.append("x = k at the channels m[b], 0 elsewhere" if store.top else "x = k, 0 at the channels m[b]")
    if isinstance(store.code, Sketch):
        code = store.code
        rows = "as many rows as channels" if code.dim is ALL else f"{code.dim} rows"
        found.append(f"y = S x, S of {rows}, {code.basis}, from seed {code.seed}")
    return tuple(found)


def _said(part: object) -> str:
    if isinstance(part, Pick):
        share = f"{part.channels} " if isinstance(part.channels, int) else f"{100 * part.channels:g} % of all "
        return f"y = the {share}channels with a store of their own" if part.top else f"y = x without {share}channels"
    if isinstance(part, PreRope):
        which = "2i and 2i + 1" if part.interleaved else "i and i + R/2"
        return f"y = R_t^-1 x, R_t turns channels {which} by t*f[i], f the model's R/2 frequencies"
    if isinstance(part, Rotate):
        whole = f"{part.heads} neighbouring heads, one behind the other" if part.heads > 1 else "the head"
        many = " and ".join(map(str, part.size)) if isinstance(part.size, tuple) else part.size
        size = whole if part.size is ALL else f"blocks of {many} channels"
        drawn = "" if part.seed is None else f", from seed {part.seed}"
        return f"y = R x, R {part.kind} over {size}{drawn}"
    if isinstance(part, Eigenbasis):
        if part.by == "balanced":
            return f"y = T x, x = T^-1 y, T balances the moments of keys and queries, of each {part.per}, calibrated"
        moment = "the moments that attention weighs" if part.by == "attention" else "their own moment"
        return f"y = U^T x, U the eigenvectors of {moment}, of each {part.per}, calibrated"
    if isinstance(part, Balance):
        return f"y[t, i] = x[t, i] / f, factors of tiles of {part.tokens} tokens in {part.loops} rounds, stored beside"
    if isinstance(part, Polar):
        if part.levels > 1:
            angles = ", ".join(f"a{level + 1}" for level in range(part.levels))
            pairs = f"then of pairs of radii, i and i + D/4, ..., down to D/{2**part.levels}, 0 <= a <= pi/2"
            return f"y = (r, {angles}), radius and angle of every pair (x[i], x[i + D/2]), 0 <= a1 < 2 pi; {pairs}"
        return "y = (r, a), radius and angle of every pair (x[i], x[i + D/2]), 0 <= a < 2 pi"
    if isinstance(part, ChannelScale):
        return f"y = x / n, n a channel's {part.by}, calibrated"
    if isinstance(part, ChannelShift):
        return f"y = x - m, m a channel's {part.by}, calibrated"
    assert isinstance(part, Permute)
    what = {None: "channels", "halves": "pairs i and i + D/2", "neighbours": "pairs 2i and 2i + 1"}[part.pairs]
    return f"y = {what} of x in order of their {part.by}, calibrated"


def absorb(side: str, store: Store, letter: str) -> Absorbed | None:
    """What becomes of one side's sums, or of those of a term whose numbers are called by a letter; None where the
    vector itself is coded.  Raises ProofError if it is not so."""
    if store.rope is not None:
        return _gathered(store, letter) if isinstance(store.code, Sparse) else _rope(store)
    if not store.mapped:
        return _polar(side, store, letter) if store.polar else None
    read = f"{letter}[t, d] = sum_i W[d, i]*y[t, i]" + (f" + {letter}0[d]" if store.shifted else "")
    read += _of_all(store)
    w = sp.Matrix(CHANNELS, NUMBERS, lambda d, i: sp.Symbol(f"W{d}{i}"))
    v = sp.Matrix(CHANNELS, 1, lambda d, _: sp.Symbol(f"v{d}") if store.shifted else 0)
    y = sp.Matrix(NUMBERS, TOKENS, lambda i, t: sp.Symbol(f"y{i}{t}"))
    x = w * y + v * sp.ones(1, TOKENS)
    if side == "keys":
        q = sp.Matrix(1, CHANNELS, lambda _, d: sp.Symbol(f"q{d}"))
        difference = q * x - ((w.T * q.T).T * y + (q * v) * sp.ones(1, TOKENS))
        statement = f"sum_d q[d]*{letter}[t, d] = sum_i (sum_d W[d, i]*q[d])*y[t, i]"
        statement += " + sum_d q[d]*v[d]" if store.shifted else ""
        where = "W is applied to the query, once per step"
    else:
        p = sp.Matrix(TOKENS, 1, lambda t, _: sp.Symbol(f"p{t}"))
        difference = x * p - (w * (y * p) + v * (sp.ones(1, TOKENS) * p))
        statement = f"sum_t p[t]*{letter}[t, d] = sum_i W[d, i]*(sum_t p[t]*y[t, i])"
        statement += " + v[d]*sum_t p[t]" if store.shifted else ""
        where = "W is applied to the output, once per step"
    if any(sp.expand(entry) != 0 for entry in difference):
        raise ProofError(f"{side}: the map does not leave the sum over tokens")
    method = f"symbolic, with {CHANNELS} channels of {NUMBERS} numbers and {TOKENS} tokens: it is linear in each"
    mapped = Absorbed(steps(store), read, statement, method, where)
    if isinstance(store, Parted) and store.masked:
        return _masked(store, mapped)
    return _behind(mapped, _polar(side, store, letter)) if store.polar else mapped


def _masked(store: Parted, whole: Absorbed) -> Absorbed:
    """The same of one of two sketches, each of vectors with zeros where the other one looks: the second meets the query
    of its own channels, the first what is left of it."""
    q, first, second = (sp.symbols(f"{name}:{CHANNELS}") for name in ("q", "k", "o"))
    for chosen in itertools.product((False, True), repeat=CHANNELS):
        parted = sum(a * (c if m else b) for a, b, c, m in zip(q, first, second, chosen, strict=True))
        own = [a if m else sp.Integer(0) for a, m in zip(q, chosen, strict=True)]
        of_first = sum((a - r) * b for a, r, b in zip(q, own, first, strict=True))
        of_second = sum(r * c for r, c in zip(own, second, strict=True))
        if sp.expand(parted - of_first - of_second) != 0:
            raise ProofError(f"keys: chosen channels {chosen} are not parted")
    statement = "q . k[t] = sum_d (q[d] - r[d])*k[t, d] + sum_d r[d]*o[t, d], r = q at the channels m[b], 0 elsewhere"
    where, read = whole.where, f"{whole.read}, of the channels m[b] alone"
    if store.top:
        where = "W is applied to r, once per block of tokens, in the loop, and what it gives taken off the other query"
    else:
        read = f"{whole.read}, of the others alone"
    return Absorbed(whole.steps, read, statement, f"symbolic ({2**CHANNELS} choices of {CHANNELS} channels)", where)


def _of_all(store: Store) -> str:
    """What a head is read from, where heads are rotated together: sums are as they were, and longer."""
    return f", i over the numbers of all {store.joined} heads" if store.joined > 1 else ""


def _behind(outer: Absorbed, inner: Absorbed) -> Absorbed:
    """A map of numbers that are themselves made of what is coded."""
    told = [f"{one}; {other}" for one, other in zip(_told(outer), _told(inner), strict=True)]
    return Absorbed(outer.steps, *told)


def _told(one: Absorbed) -> tuple[str, ...]:
    return one.read, one.statement, one.method, one.where


def _polar(side: str, store: Store, letter: str) -> Absorbed:
    """What a pair of numbers adds to a score or an output, in its radius and its angle."""
    x, z = sp.symbols("x z", real=True, nonzero=True)
    q, p, r, a = sp.symbols("qx qz r a", real=True)
    of_pair = r * (q * sp.cos(a) + p * sp.sin(a))  # a score; of an output, with q or p 0, a channel under weight 1
    given = of_pair.subs({r: sp.sqrt(x**2 + z**2), a: sp.atan2(z, x)})
    turned = of_pair.subs(a, a + 2 * sp.pi)  # the angle that atan2 gives below 0 is stored a whole turn on
    if sp.simplify(given - (q * x + p * z)) != 0 or sp.expand(turned - of_pair) != 0:
        raise ProofError(f"{side}: radius and angle of a pair do not give the pair back")
    letter = "y" if store.mapped else letter
    if store.levels > 1:
        return _levels(side, store, letter)
    read = f"{letter}[t, i] = r[t, i]*cos a[t, i], {letter}[t, i + D/2] = r[t, i]*sin a[t, i]"
    if side == "keys":
        outer = "q'" if store.mapped else "q"
        statement = f"sum_d {outer}[d]*{letter}[t, d] = "
        statement += f"sum_i r[t, i]*({outer}[i]*cos a[t, i] + {outer}[i + D/2]*sin a[t, i])"
    else:
        statement = f"sum_t p[t]*{letter}[t, i] = sum_t p[t]*r[t, i]*cos a[t, i], with i + D/2 the same of sin"
    method = "symbolic, for one pair, and for its angle a turn further"
    where = "r cos a and r sin a are made in the loop, of decoded r and a"
    return Absorbed(steps(store), read, statement, method, where)


def _levels(side: str, store: Store, letter: str) -> Absorbed:
    """The same of several levels: the radius of a pair is itself one of a pair, whose proof is that of any pair."""
    levels = store.levels
    product = f"r[t, d % (D/{2**levels})] * product over l = 1 to {levels} of cos or sin of al[t, d % (D/2^l)]"
    read = f"{letter}[t, d] = {product}, cos where d % (D/2^(l - 1)) < D/2^l"
    over, outer = ("d", "q'[d]" if store.mapped else "q[d]") if side == "keys" else ("t", "p[t]")
    statement = f"sum_{over} {outer}*{letter}[t, d] with {read}"
    method = "symbolic, for one pair, and for its angle a turn further: each level is one of pairs"
    return Absorbed(steps(store), read, statement, method, "channels are made in the loop, of decoded radii and angles")


def _rope(store: Store) -> Absorbed:
    """A score's two terms for one rotary pair: y cos meets the query, y sin the query turned by 90 degrees."""
    t0, i, f = sp.symbols("t0 i f", real=True)
    q, y = sp.Matrix(sp.symbols("qa qb")), sp.Matrix(sp.symbols("ya yb"))

    def turned(angle: sp.Expr) -> sp.Matrix:
        return sp.Matrix([[sp.cos(angle), -sp.sin(angle)], [sp.sin(angle), sp.cos(angle)]])

    right_angle = sp.Matrix([[0, 1], [-1, 0]])
    once = turned(t0 * f).T * q
    outer, inner, told = (_channelwise if store.channelwise else _mixed)(store)
    matrix, shift = inner  # x = outer*(matrix*y + shift), of which what is in brackets is made in the loop
    kept = matrix * y + shift
    terms = sp.cos(i * f) * kept.dot(outer.T * once) + sp.sin(i * f) * kept.dot(outer.T * right_angle * once)
    tile = sp.cos(t0 * f) * q + sp.sin(t0 * f) * right_angle * q - once
    score = q.dot(turned((t0 + i) * f) * outer * kept) - terms
    if any(sp.expand(sp.expand_trig(sp.expand(one))) != 0 for one in (score, *tile)):
        raise ProofError("keys: rotary positions are not the sum of two terms")
    return Absorbed(
        steps(store),
        told.read,
        f"q . k[t0 + i] = {told.terms} with q' = R_t0^-1 q, q'' = (q'[b], -q'[a]) for every pair (a, b){told.onto}",
        "symbolic, for one pair: a score is a sum over pairs",
        f"R_t0 is applied to the query, once per tile{told.once}; {told.loop} to decoded numbers, in the loop",
    )


def _gathered(store: Store, letter: str) -> Absorbed:
    """What a single number adds to a score: the query is gathered at its channel and at the other one of its pair."""
    angle, number = sp.symbols("a n", real=True)
    q, quarter = sp.Matrix(sp.symbols("qa qb")), sp.Matrix([[0, 1], [-1, 0]])
    cos, sin = sp.cos(angle), sp.sin(angle)
    turned, other = sp.Matrix([[cos, -sin], [sin, cos]]), quarter * q
    for place in range(2):
        alone = sp.Matrix([number if place == 0 else 0, number if place == 1 else 0])
        if sp.expand(q.dot(turned * alone) - number * (cos * q[place] + sin * other[place])) != 0:
            raise ProofError("keys: a single number at its position does not meet both channels of its pair")
    return Absorbed(
        steps(store),
        f"{letter}[t] = R_t y[t]",
        f"q . {letter}[t] = sum_d q[t, d]*y[t, d] with q[t] = R_t^-1 q, "
        "q[t, d] = cos(t*f[d])*q[d] + sin(t*f[d])*q''[d], q'' = (q[b], -q[a]) for every pair (a, b)",
        "symbolic, for one pair and a number in either place",
        "R_t^-1 q is made where a number stands, of the query at both channels of a pair",
    )


@dataclass(frozen=True)
class _Told:
    """How keys behind their positions are read, the terms of a score, what else goes onto the query: what, and when;
    what is applied in the loop."""

    read: str
    terms: str
    onto: str
    once: str
    loop: str


Affine = tuple[sp.Matrix, sp.Matrix]


def _mixed(store: Store) -> tuple[sp.Matrix, Affine, _Told]:
    """Of one pair, x = W y + v with W = outer*inner and v = outer*(v/outer)."""
    outer, matrix = sp.diag(*sp.symbols("oa ob")), sp.Matrix(2, 2, sp.symbols("iaa iab iba ibb"))
    shift = sp.Matrix(sp.symbols("ua ub")) if store.shifted else sp.zeros(2, 1)
    added, v = (" + v[d]/o[d]", " + v") if store.shifted else ("", "")
    told = _Told(
        f"k[t] = R_t (W y[t]{v}), W[d, i] = o[d]*I[i, d]{_of_all(store)}",
        "sum_d cos(i*f[d])*x[t, d]*q'[d] + sin(i*f[d])*x[t, d]*q''[d]",
        f", x[t, d] = sum_i I[i, d]*y[t, i]{added}, o[d] applied to q'[d] and q''[d]",
        "",
        "W, then R_i,",
    )
    return outer, (matrix, shift), told


def _channelwise(store: Store) -> tuple[sp.Matrix, Affine, _Told]:
    """Of one pair, channel d(m) of x = n[m]*(y[m] + u[m]): its numbers are those of its channels in some order."""
    order = sp.Matrix([[0, 1], [1, 0]]) if store.permuted else sp.eye(2)
    factors = sp.diag(*sp.symbols("na nb")) if store.scaled else sp.eye(2)
    shift = sp.Matrix(sp.symbols("ua ub")) if store.shifted else sp.zeros(2, 1)
    d = "d(m)" if store.permuted else "d"
    m = "m" if store.permuted else "d"
    n, over = (f"n[{m}]*", f"/n[{m}]") if store.scaled else ("", "")
    number = f"(y[t, {m}] + v[{d}]{over})" if store.shifted else f"y[t, {m}]"
    read = "k[t] = R_t y[t]"
    if store.mapped:
        read = f"k[t] = R_t x[t], x[t, {d}] = {n}{number}"
        read += ", d(m) the channel of number m" if store.permuted else ""
    terms = f"sum_{m} cos(i*f[{d}])*{number}*q'[{d}] + sin(i*f[{d}])*{number}*q''[{d}]"
    onto = f", n[{m}] applied to q'[{d}] and q''[{d}]" if store.scaled else ""
    parts = ["the order of channels"] * store.permuted + ["n"] * store.scaled
    once = f", {' and '.join(parts)} once per step" if parts else ""
    return order * factors, (sp.eye(2), shift), _Told(read, terms, onto, once, "R_i")
