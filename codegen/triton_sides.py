"""A side's part of an attention kernel, in Triton: the sum of its terms, and exact rows."""

from __future__ import annotations

from collections.abc import Sequence

from .placement import When
from .plan import Plan, drawn
from .triton_gather import gathers
from .triton_keys import Keys
from .triton_masked import MaskedKeys
from .triton_planes import Planes
from .triton_rows import ExactRows
from .triton_values import Values

PLANAR = (Keys, MaskedKeys)  # keys that are nothing but codes, whose scores are sums over planes


def largest(*groups: Sequence[str]) -> list[str]:
    """Lines that make of tiles [lanes, rows] the largest size of each row; those of a group have as many lanes, and
    become one tile before lanes are exchanged.  Both names are rows in the end, whichever branch they are made in."""
    lines: list[str] = []
    for names in filter(None, groups):
        name = "more" if lines else "top"
        lines.append(f"{name} = tl.abs({names[0]})")
        lines += [f"{name} = tl.maximum({name}, tl.abs({x}))" for x in names[1:]]
        lines.append(f"{name} = tl.max({name}, 0)")
        lines += ["top = tl.maximum(top, more)"] * (name == "more")
    return lines


class KeySide:
    """The keys' part of an attention kernel: the sum of their terms, and exact rows."""

    def __init__(self, plan: Plan, terms: Sequence[Keys]) -> None:
        self.plan, self.side = plan, plan.keys
        self.terms = terms
        self.first = self.terms[0]
        self.positions = self.first.positions
        self.exact_rows = None
        if self.side.apart:
            self.exact_rows = ExactRows(plan, self.side, self.first.exact, self.first.precise)
        self.query = "turned" if plan.maps_query else "query"

    def inputs(self) -> list[str]:
        """The arguments that stand beside the query: the turned query, what it adds to a score, rotary positions."""
        given = ["gathered_ptr"] * gathers(self.plan)
        given += [name for term in self.terms for name in term.inputs()]
        if self.positions is not None:
            return [*self.positions.inputs(), *given]
        if self.plan.rotates:
            return [*["keys_signs_ptr"] * drawn(self.side), *given]
        return ["turned_ptr", *["bias_ptr"] * self.side.shifted, *given] if self.plan.maps_query else given

    def lane_lines(self) -> list[str]:
        return [line for term in self.terms for line in term.lane_lines()]

    def readers(self) -> list[Planes]:
        """All that read words, of one head each."""
        return [reader for term in self.terms for reader in term.readers]

    # ---- once per query -------------------------------------------------------------------------------------------

    def loads(self) -> list[str]:
        """Load the query rows of all terms, which what is below prepares."""
        return [line for term in self.terms for line in term.loads(self.query)]

    def _rows(self, others: list[str] | None = None) -> list[str]:
        """The query rows of all terms divided by one size; `others` share it."""
        lines = [line for term in self.terms for line in term.loaded()]
        names = [name for term in self.terms for name in term.rows()]
        turned = [f"w{j}" for j in self.positions.count] if self.positions is not None else []
        beside = turned if self.side.factored else []  # other factors than those of their partners in x are on them
        lines += largest(*(term.rows() for term in self.terms), others or [], beside)
        lines.append("size, inverse = above(top)  # [rows]")
        lines += [f"{name} = {name} * inverse[None, :]" for name in [*names, *turned]]
        if self.side.shifted and self.side.hoisted:
            lines.append("bias = tl.load(bias_ptr + head * queries + token, mask=live, other=0.0) * scaling * inverse")
        return lines

    def _operands(self) -> list[str]:
        """What decoded numbers of all terms meet."""
        return [line for term in self.terms for line in term.operands()]

    def prologue(self) -> list[str]:
        """Prepare the query rows for the planes."""
        if self.positions is not None:
            fixed = self.positions.fixed() if self.positions.placed else []
            return self._rows() + fixed + self.positions.prologue()
        lines = self._rows()
        for term in self.terms:
            lines += [*(term.operands() if term.decoded else []), *term.prepared()]
        return lines

    def edge_prologue(self) -> list[str]:
        """The operands for decoded numbers, and for exact ones."""
        rows = self.exact_rows
        if rows is None:
            return self._rows() + self._operands()
        lines = [*rows.lanes(), *rows.queries(), *self._rows([f"r{j}" for j in rows.planes])]
        if self.positions is not None:
            lines += [*self.positions.fixed(), *self.positions.prologue()]
        else:
            lines += self._operands()
        return lines + [f"f{j} = (r{j} * inverse[None, :]).to({self.first.exact})" for j in rows.planes]

    def exact_prologue(self, size: str) -> list[str]:
        """The operands for exact numbers behind packed ones, whose scores are in units of `size`."""
        rows = self.exact_rows
        if rows is None:
            names = [name for term in self.terms for name in term.rows()]
            lines = [*self.loads(), *(line for term in self.terms for line in term.loaded())]
            lines += [f"shrink = 1.0 / {size}", *(f"{name} = {name} * shrink[None, :]" for name in names)]
            return lines + self._operands()
        names = [f"r{j}" for j in rows.planes]
        lines = [*rows.lanes(), *rows.queries(), *largest(names), "row_size, shrink = above(top)  # [rows]"]
        lines += [f"f{j} = (r{j} * shrink[None, :]).to({self.first.exact})" for j in rows.planes]
        return [*lines, f"row_size = row_size / {size}"]

    def mixed_prologue(self, size: str) -> list[str]:
        """The operands for exact numbers beside packed ones, for which the rows of the query have been prepared."""
        if self.exact_rows is None:
            return self._operands()
        return self.exact_prologue(size)

    # ---- once per tile --------------------------------------------------------------------------------------------

    def scores(self, half: int, tokens: str) -> list[str]:
        """s = scores of the sub-tile's packed tokens [tokens, rows], in units of the row's `size`."""
        return self._summed([term.scores(half, tokens) for term in self.terms])

    def _summed(self, terms: list[list[str]]) -> list[str]:
        """Lines of all terms, their scores added up, and what a shift adds to each."""
        lines = [line for term in terms for line in term]
        names = [f"s{term.mark}" for term in self.terms]
        lines += [f"s = {' + '.join(names)}"] * (len(names) > 1)
        return lines + ["s = s + bias[None, :]"] * (self.side.shifted and self.side.hoisted)

    def decoded(self) -> list[str]:
        """s = scores of edge tokens, decoded."""
        return self._summed([term.tokens() for term in self.terms])

    @property
    def in_planes(self) -> bool:
        """Tokens at the edges may be scored as those of clean pages are: nothing but codes is read, and a scale is put
        onto scores or onto the query."""
        plain = all(type(term) in PLANAR and not term.decoded and term.positions is None for term in self.terms)
        return plain and all(term.side.when is not When.IN_LOOP and not term.side.layout.across for term in self.terms)

    def exact(self, there: str) -> list[str]:
        """r = scores of edge tokens, from exact rows, where a mask says that they are there."""
        if self.exact_rows is not None:
            return self.exact_rows.scores(there)
        if self.side.stretch:
            return [line for i, term in enumerate(self.terms) for line in term.exact_scores(there, more=i > 0)]
        plain = (term for term in self.terms if term.side is self.side.plain)
        return next(plain, self.first).exact_scores(there)  # of bands the one that has all


class ValueSide:
    """The values' part of an attention kernel: sums of every term, and of exact rows."""

    def __init__(self, plan: Plan, terms: Sequence[Values]) -> None:
        self.plan, self.side = plan, plan.values
        self.terms = terms
        self.first = self.terms[0]
        self.exact_rows = None
        if self.side.apart:
            self.exact_rows = ExactRows(plan, self.side, self.first.exact, self.first.precise)

    def outputs(self) -> list[str]:
        """The arguments where sums over exact rows go, and the packed tokens' share of the weights."""
        return ["exact_ptr", *(["share_ptr"] if self.side.shifted else [])] if self.side.apart else []

    def lane_lines(self) -> list[str]:
        return [line for term in self.terms for line in term.lane_lines()]

    def prologue(self) -> list[str]:
        return [line for term in self.terms for line in term.prologue()]

    def accumulate(self, half: int, tokens: str) -> list[str]:
        """Add a sub-tile's packed values under weights p.

        Beside keys that are turned in the loop registers are few: single numbers, which gather p, come first, while
        nothing else is made of it."""
        terms = list(self.terms)
        if self.plan.keys.rope is not None:
            terms.sort(key=lambda term: term.side.slots is None)
        return [line for term in terms for line in term.accumulate(half, tokens)]

    def epilogue(self) -> list[str]:
        return [line for term in self.terms for line in term.epilogue()]

    def stores(self, out: str, united: str, once: str) -> list[str]:
        """Lines that store what was summed, one term behind the other, as `Values.stores`."""
        return [line for term in self.terms for line in term.stores(out, united, once)]

    def edge_prologue(self, *, outputs: bool = True) -> list[str]:
        """Sums over edge tokens: of exact rows that are apart, and `outputs`."""
        sums = [line for term in self.terms for line in term.edge_prologue()] if outputs else []
        return sums + self.exact_prologue("tl.zeros([ROWS], tl.float32)")

    def either(self) -> list[str]:
        """Add edge tokens under weights p: decoded where `coded`, from exact rows where `exact`."""
        return self.decoded() + self._rows("exact")

    def mixed_prologue(self, planes: ValueSide) -> list[str]:
        """Sums over planes of packed tokens, and those of exact rows beside them."""
        return planes.prologue() + self.edge_prologue(outputs=self.exact_rows is None)

    def either_in_planes(self, planes: ValueSide) -> list[str]:
        """Add edge tokens under weights p: as those of clean pages where `coded`, from exact rows where `exact`."""
        lines = [*self._decayed(outputs=self.exact_rows is None), *self._rows("exact")]
        lines.append("p = tl.where(coded[:, None], p, 0.0)")
        lines += ["coded_mass = coded_mass + tl.sum(p, 0)"] * self.side.shifted
        return lines + planes.accumulate(0, "t")

    def mixed_epilogue(self, planes: ValueSide) -> list[str]:
        """o0, o1, ... = the outputs of both."""
        return [line for term in planes.terms for line in term.epilogue(more=self.exact_rows is None)]

    def decoded(self) -> list[str]:
        """Add edge tokens under weights p, decoded, where `coded`."""
        lines = [*self._decayed(), *(line for term in self.terms for line in term.tokens())]
        if self.side.shifted:
            lines.append("coded_mass = coded_mass + tl.sum(tl.where(coded[:, None], p, 0.0), 0)")
        return lines

    @property
    def in_planes(self) -> bool:
        """Tokens at the edges may be added up as those of clean pages are, in the basis of dirty planes."""
        return all(type(term) is Values and term.in_planes for term in self.terms)

    def exact_prologue(self, coded_mass: str) -> list[str]:
        """Sums of exact numbers that are apart from those of packed tokens, and `coded_mass`, the weights of those that
        came before."""
        if self.exact_rows is None:
            return []
        lines = [*self.exact_rows.lanes(), *self.exact_rows.accumulators()]
        return lines + [f"coded_mass = {coded_mass}"] * self.side.shifted

    def exact(self, there: str) -> list[str]:
        """Add edge tokens under weights p from exact rows, where a mask says that they are there."""
        return self._decayed() + self._rows(there)

    def _decayed(self, *, outputs: bool = True) -> list[str]:
        """The weights as an operand, and sums over edge tokens, decayed: those of exact rows, and `outputs`."""
        sums = [name for term in self.terms for name in term.sums()] if outputs else []
        sums += self.exact_rows.names() if self.exact_rows is not None else []
        lines = [f"weight = {self.first.cast('p')}", *(f"{name} = {name} * decay[None, :]" for name in sums)]
        return lines + ["coded_mass = coded_mass * decay"] * self.side.shifted

    def _rows(self, there: str) -> list[str]:
        """Lines that add exact rows to sums that have decayed."""
        if self.exact_rows is not None:
            return self.exact_rows.accumulate(there)
        if self.side.stretch:
            return [line for term in self.terms for line in term.exact_tokens(there)]
        plain = (term for term in self.terms if term.side is self.side.plain)
        return next(plain, self.first).exact_tokens(there)  # of bands the one that has all
