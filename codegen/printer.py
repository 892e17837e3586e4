"""Turning expressions into source: one printer for tile arithmetic, with broadcasting decided by named axes."""

from __future__ import annotations

from collections.abc import Mapping

import sympy as sp

Axes = tuple[str, ...]


def number(value: sp.Expr) -> str:
    """A float literal that reads back as exactly this rational."""
    exact = sp.Rational(value)
    text = repr(float(exact))
    if sp.Rational(float(exact)) != exact:
        raise ValueError(f"{exact} is no float64")
    return text


def broadcast(text: str, have: Axes, want: Axes, lead: str = "") -> str:
    """Index an array of axes `have` to broadcast against `want`; `lead` is "..., " where batch axes go before."""
    if have == want or not have:
        return text
    index = ", ".join(":" if axis in have else "None" for axis in want)
    return f"{text}[{lead}{index}]"


class TilePrinter:
    """Prints sums of products of named arrays.  `axes` gives each name's axes; factors of equal axes are multiplied
    before they are broadcast, so that a product of two vectors costs a vector."""

    def __init__(self, axes: Mapping[str, Axes], lead: str = "") -> None:
        self.axes = dict(axes)
        self.lead = lead

    def print(self, expression: sp.Expr, want: Axes) -> str:
        """The expression as source over the axes `want`."""
        terms = sorted(sp.Add.make_args(expression), key=lambda term: (-len(self.reach(term)), sp.sstr(term)))
        text = ""
        for term in terms:
            coefficient, rest = term.as_coeff_Mul()
            sign = "-" if coefficient < 0 else "+"
            piece = self._product(abs(coefficient), rest, want, alone=len(terms) == 1)
            if text:
                text += f" {sign} {piece}"
            else:
                text = piece if sign == "+" else f"-{piece}"
        return text

    def reach(self, expression: sp.Expr) -> set[str]:
        """The axes an expression varies along."""
        return {axis for symbol in expression.free_symbols for axis in self.axes[str(symbol)]}

    def _product(self, coefficient: sp.Expr, rest: sp.Expr, want: Axes, *, alone: bool) -> str:
        classes: dict[Axes, list[str]] = {}
        for factor in sorted(sp.Mul.make_args(rest), key=lambda f: (len(self.reach(f)), sp.sstr(f))):
            if factor == 1:
                continue
            if factor.is_Pow or not (factor.is_Symbol or factor.is_Add):
                raise ValueError(f"no way to print {factor}")
            axes = tuple(axis for axis in want if axis in self.reach(factor))
            text = str(factor) if factor.is_Symbol else f"({self.print(factor, axes)})"
            classes.setdefault(axes, []).append(text)
        if coefficient != 1 or not classes:
            axes = min(classes, key=len) if classes else ()
            classes.setdefault(axes, []).append(number(coefficient))
        pieces = []
        for axes in sorted(classes, key=len, reverse=True):
            texts = classes[axes]
            joined = " * ".join(texts)
            if len(texts) > 1 and axes != want and axes:
                joined = f"({joined})"
            pieces.append(broadcast(joined, axes, want, self.lead))
        return " * ".join(pieces)
