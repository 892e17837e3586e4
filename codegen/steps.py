"""The arithmetic of the normal form as lines of source, the same for both backends.

`unit` is what a code read from a plane has to be multiplied by (2**24 where a masked word is a subnormal float16);
`lead` precedes an index that adds an axis; `operand` is what a query must be cast to before a product; a scale that is
rounded to float16 for a product is taken 2**lift times as large; `abreast`: tokens have scales in every column.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import sympy as sp

from .algebra import clean_from_dirty, decoded, query_of_dirty
from .placement import When
from .plan import SidePlan
from .printer import TilePrinter, number


@dataclass(frozen=True)
class Steps:
    """Prints one side's steps for one backend."""

    side: SidePlan
    unit: sp.Rational
    lead: str
    operand: str
    lift: int = 0
    abreast: bool = False

    @property
    def lifted(self) -> sp.Expr:
        """What is left of the unit where the scale was lifted."""
        return self.unit / sp.Integer(2) ** self.lift

    def printed(self, expression: sp.Expr, axes: Mapping[str, tuple[str, ...]], names: Mapping[str, str]) -> str:
        """An expression over plain symbols, broadcast over the first symbol's axes, with names put in."""
        return renamed(_printed(expression, tuple(axes.items()), self.lead), names)

    def prepared(self, source: str) -> list[str]:
        """q<width>_<plane> = the combination of query planes that multiplies that dirty plane."""
        lines = []
        for stream in self.side.operands:
            for place in stream.places:
                position = place.bit // stream.width
                text = ""
                for step, factor in query_of_dirty(stream.width, position, self.side.run(stream, place.plane)):
                    factor = factor * 2**stream.shift
                    name = f"{source}{place.plane + step - position}"
                    term = name if abs(factor) == 1 else f"{name} * {number(abs(factor))}"
                    text = f"{text} {'-' if factor < 0 else '+'} {term}" if text else term
                cast = (f"({text})" if " " in text else text) + self.operand if self.operand else text
                lines.append(f"q{stream.width}_{place.plane} = {cast}")
        return lines

    def scaled(self, plane: int, query: str, scale: str, offset: str) -> list[str]:
        """y<plane>: the query times the channels' scale; b<plane>: what adds up to the offset's share of the score."""
        return [f"y{plane} = {self.times_scale(query, scale, offset)}", *self.added(plane, query, scale, offset)]

    def times_scale(self, query: str, scale: str, offset: str) -> str:
        """What multiplies a channel's codes in a score."""
        factor = sum((plain(t.channel_factor) for t in self.side.form.terms if t.coded), sp.Integer(0))
        return self._of_channel(factor * sp.Integer(2) ** self.lift, query, scale, offset)

    def added(self, plane: int, query: str, scale: str, offset: str) -> list[str]:
        """b<plane>: what adds up, over channels, to the offset's share of the score; no line if it has none."""
        share = self.share(query, scale, offset)
        return [] if share is None else [f"b{plane} = {share}"]

    def share(self, query: str, scale: str, offset: str) -> str | None:
        """What adds up, over channels, to the offset's share of the score; None if it has none."""
        parts = (plain(t.channel_factor * t.token_factor) for t in self.side.form.terms if not t.coded)
        rest = sum(parts, sp.Integer(0))
        return None if rest == 0 else self._of_channel(rest, query, scale, offset)

    def _of_channel(self, factor: sp.Expr, query: str, scale: str, offset: str) -> str:
        axes = {"q": ("w", "r"), "s": ("w",), "z": ("w",)}
        return self.printed(factor, axes, {"q": query, "s": scale, "z": offset})

    @property
    def offset_in_score(self) -> bool:
        """Something besides the codes adds to a score."""
        return any(not term.coded for term in self.side.form.terms)

    def assembled(self, dot: str, total: str, scale: str, offset: str) -> str:
        """A score from a group's dot product, the query's total over the group, and the token's stored numbers."""
        s, total_of = sp.symbols("dot total")
        score = sum(plain(t.token_factor) * (self.unit * s if t.coded else total_of) for t in self.side.form.terms)
        factored = sp.factor_terms(score)
        axes = {"dot": ("t", "r"), "total": ("r",), "s": ("t",), "z": ("t",)}
        names = {"dot": dot, "total": total, "s": scale, "z": offset}
        return self._in_columns(self.printed(factored if factored.is_Mul else score, axes, names))

    def weight(self, weights: str, scale: str) -> str:
        """What multiplies a token's codes in the output: its weight times its scale."""
        coded = next(t for t in self.side.form.terms if t.coded)
        factor = plain(coded.token_factor)
        factor = factor * sp.Integer(2) ** self.lift if self.scaled_weights else factor
        return self._in_columns(self.printed(factor, {"p": ("t", "r"), "s": ("t",)}, {"p": weights, "s": scale}))

    def _in_columns(self, text: str) -> str:
        """An expression over scores, where what tokens have stored is given for every column."""
        return text.replace("[:, None]", "") if self.abreast else text

    @property
    def scaled_weights(self) -> bool:
        """Weights carry the tokens' scales."""
        return self.side.when is When.AFTER_DOT

    def carried(self, weights: str, scale: str, offset: str) -> tuple[str, sp.Expr] | None:
        """(what each token adds to the offsets' sum, the constant taken out of that sum); None: nothing is carried."""
        terms = [t for t in self.side.form.terms if not t.coded]
        if not terms or self.side.when not in (When.AFTER_DOT, When.ONCE_PER_QUERY):
            return None
        if self.side.when is When.ONCE_PER_QUERY:
            return weights, sp.Integer(1)
        coefficient, rest = sum(plain(t.token_factor * t.channel_factor) for t in terms).as_coeff_Mul()
        axes = {"p": ("t", "r"), "s": ("t",), "z": ("t",)}
        return self._in_columns(self.printed(rest, axes, {"p": weights, "s": scale, "z": offset})), coefficient

    def carried_by_token(self, scale: str, offset: str) -> str | None:
        """What each weight is multiplied by in the offsets' sum, where tokens are scaled; None if nothing is."""
        terms = [t for t in self.side.form.terms if not t.coded]
        if not terms:
            return None
        each = sum(plain(t.token_factor * t.channel_factor) for t in terms) / sp.Symbol("p")
        return self.printed(sp.expand(each), {"s": ("t",), "z": ("t",)}, {"s": scale, "z": offset})

    def clean(self, plane: int) -> str:
        """The sum of codes of one plane, from the sums over dirty planes."""
        text = ""
        for stream in self.side.operands:
            position = stream.places[plane].bit // stream.width
            parts = clean_from_dirty(stream.width, position, self.side.run(stream, plane))
            names = [f"a{stream.width}_{plane + step - position}" for step, _ in parts]
            inner = names[0] if len(names) == 1 else f"({names[0]} - {names[1]})"
            unit = self.lifted if self.scaled_weights else self.unit
            factor = parts[0][1] * unit * 2**stream.shift
            text += (" + " if text else "") + (inner if factor == 1 else f"{inner} * {number(factor)}")
        return text

    def output(self, total: str, mass: str, scale: str, offset: str) -> str:
        """Real sums of a plane's channels from sums of codes and the mass of weights, where channels are scaled."""
        c, p = sp.symbols("c p")
        whole = sum(plain(t.token_factor * t.channel_factor) * (c / p if t.coded else 1) for t in self.side.form.terms)
        axes = {"c": ("w", "r"), "s": ("w",), "z": ("w",), "p": ("r",)}
        return self.printed(sp.expand(whole), axes, {"c": total, "s": scale, "z": offset, "p": mass})

    def plus_carried(self, text: str, group: int, coefficient: sp.Expr) -> str:
        """A plane's sums with the offsets of its group added."""
        name = f"carried{group}"
        scaled = name if abs(coefficient) == 1 else f"({name} * {number(abs(coefficient))})"
        return f"{text} {'-' if coefficient < 0 else '+'} {scaled}[{self.lead}None, :]"

    def number(self, code: str, scale: str, offset: str) -> str:
        """A decoded number over equal-shaped arrays."""
        c, s, z = sp.symbols("c s z")
        expression = decoded(self.side.store, self.side.alphabet, c, s, z)
        axes = {"c": ("x",), "s": ("x",), "z": ("x",)}
        return self.printed(expression, axes, {"c": code, "s": scale, "z": offset})


def plain(expression: sp.Expr) -> sp.Expr:
    """Indexed symbols without their indices: s[t, g] -> s.  Factors of tiles are applied apart, behind sums."""
    names = {item: str(item.base) for item in expression.atoms(sp.Indexed)}
    return expression.xreplace(
        {item: sp.Integer(1) if name == "f" else sp.Symbol(name) for item, name in names.items()}
    )


def renamed(text: str, names: Mapping[str, str]) -> str:
    """Every name of the text that stands in `names`, replaced."""
    return re.sub(r"\b[A-Za-z_]\w*\b", lambda match: names.get(match[0], match[0]), text)


@cache
def _printed(expression: sp.Expr, axes: tuple[tuple[str, tuple[str, ...]], ...], lead: str) -> str:
    """An expression over plain symbols, the same for all planes and tiles, broadcast over the first symbol's axes."""
    return TilePrinter(dict(axes), lead).print(expression, axes[0][1])
