"""Vectors of low rank in Triton: x_t = sum_j a[t, j] b[j], rows a[., j] of a page and vectors b of a block.

A score is sum_j a[t, j] (q . b[j]), an output sum_j (sum_t p_t a[t, j]) b[j]: the query meets the vectors once a tile,
and tokens meet `rank` numbers, as weights do before their sums meet the vectors.  No channel of a token is made.  Ranks
up to 16 are one side of a tensor-core operand, zeros beyond them.
"""

from __future__ import annotations

from .plan import SidePlan
from .sections import Factors
from .triton_keys import Keys
from .triton_planes import Planes
from .triton_values import Values

RANKS = 16  # lanes of a tensor-core operand


def held_by(side: SidePlan) -> Factors:
    """Where a term's vectors of low rank stand."""
    assert side.factors is not None
    return side.factors


class Factored(Planes):
    """Loading rows and vectors, and what a number is made of them."""

    @property
    def held(self) -> Factors:
        return held_by(self.side)

    def lane_lines(self) -> list[str]:
        lines = super().lane_lines() + [f"{self.prefix}_rank = tl.arange(0, {RANKS})"]
        if self.held.rank < RANKS:
            lines.append(f"{self.prefix}_rank_in = {self.prefix}_rank < {self.held.rank}")
        return lines

    def _load(self, address: str, masks: list[str]) -> str:
        masks = [mask for mask in masks if mask]
        known = f", mask={' & '.join(masks)}, other=0.0" if masks else ""
        text = f"tl.load({address}{known})"
        exact = getattr(self, "exact", "tl.float16") == "tl.float32"
        return f"{text}.to(tl.float32)" if exact else text

    def _ranks(self, index: str) -> tuple[str, str]:
        """The ranks as an index of a tile, and their mask."""
        name = f"{self.prefix}_rank"
        return f"{name}[{index}]", f"{name}_in[{index}]" if self.held.rank < RANKS else ""

    def rows_of(self, tokens: str, *, across: bool) -> str:
        """The load of the tokens' numbers, [tokens, ranks], or `across` [ranks, tokens]."""
        rank, mask = self._ranks(":, None" if across else "None, :")
        token = f"{tokens}[None, :]" if across else f"{tokens}[:, None]"
        return self._load(f"{self.prefix}_rows + {token} + {rank} * {self.plan.layout.page_tokens}", [mask])

    def vectors_of(self, plane: int, block: str, *, across: bool) -> str:
        """The load of a plane of the block's vectors, [ranks, lanes], or `across` [lanes, ranks]."""
        rank, mask = self._ranks("None, :" if across else ":, None")
        index = ":, None" if across else "None, :"
        start = "" if block == "0" else f" + {block} * {self.held.rank * self.side.dim}"
        address = f"{self.prefix}_vectors{start} + {rank} * {self.side.dim} + {self.plane_lane(plane)}[{index}]"
        inside = self.inside(plane)
        return self._load(address, [mask, f"{inside}[{index}]" if inside else ""])

    def block(self, half: int) -> str:
        """The block, within its page, of sub-tile `half`."""
        if self.held.blocks == 1:
            return "0"
        first = f"(page_token + {half * self.plan.half})" if half else "page_token"
        return f"{first} // {self.held.tokens}"

    def edge_block(self) -> list[str]:
        """The line that names the block of an edge tile, whose tokens are of one."""
        if self.held.blocks == 1:
            return []
        page, edge = self.plan.layout.page_tokens, self.plan.edge_tile
        return [f"{self.prefix}_block = tl.maximum(tile, 0) * {edge} % {page} // {self.held.tokens}"]

    @property
    def named_block(self) -> str:
        """What `edge_block` has named."""
        return "0" if self.held.blocks == 1 else f"{self.prefix}_block"


class FactoredKeys(Factored, Keys):
    """Scores of low-rank keys."""

    @property
    def decoded(self) -> bool:
        return True

    def prepared(self) -> list[str]:
        return []

    def _scores(self, half: int, tokens: str) -> list[str]:
        return self._met_by(tokens, self.block(half))

    def tokens(self) -> list[str]:
        return self.own([*self.edge_block(), *self._met_by("t", self.named_block)])

    def _met_by(self, tokens: str, block: str) -> list[str]:
        """The query meets the block's vectors, in units of its largest product: these are operands again."""
        p, lines = self.prefix, list[str]()
        for j in range(self.side.layout.planes):
            so_far = f", {p}_met" if j else ""
            lines.append(f"{p}_vector = {self.vectors_of(j, block, across=False)}")
            lines.append(f"{p}_met = tl.dot({p}_vector, e{j}{so_far}{self.precise})  # [ranks, rows]")
        lines.append(f"{p}_number = {self.rows_of(tokens, across=False)}")
        if self.precise:
            return [*lines, f"s = tl.dot({p}_number, {p}_met{self.precise})"]
        lines.append(f"{p}_size, {p}_inverse = above(tl.max(tl.abs({p}_met), 0))  # [rows]")
        lines.append(f"{p}_operand = ({p}_met * {p}_inverse[None, :]).to(tl.float16)")
        return [*lines, f"s = tl.dot({p}_number, {p}_operand) * {p}_size[None, :]"]


class FactoredValues(Factored, Values):
    """Sums of low-rank values."""

    @property
    def in_planes(self) -> bool:
        return False

    def _accumulate(self, half: int, tokens: str) -> list[str]:
        decay = " * decay[None, :]" if half == 0 else ""
        number = f"{self.prefix}_number = {self.rows_of(tokens, across=True)}"
        return [number, *self._add(self.cast("p"), self.block(half), decay)]

    def tokens(self) -> list[str]:
        number = f"{self.prefix}_number"
        lines = [f"{number} = {self.rows_of('t', across=True)}", f"{number} = tl.where(coded[None, :], {number}, 0.0)"]
        return self.own([*self.edge_block(), *lines, *self._add("weight", self.named_block, "")])

    def _add(self, weight: str, block: str, decay: str) -> list[str]:
        """Tokens' numbers under their weights meet the block's vectors."""
        p = self.prefix
        lines = [f"{p}_sums = tl.dot({p}_number, {weight}{self.precise})  # [ranks, rows]"]
        lines.append(f"{p}_operand = {self.cast(f'{p}_sums')}")
        for j in range(self.side.layout.planes):
            lines.append(f"{p}_vector = {self.vectors_of(j, block, across=True)}")
            lines.append(f"o{j} = tl.dot({p}_vector, {p}_operand, o{j}{decay}{self.precise})")
        return lines
