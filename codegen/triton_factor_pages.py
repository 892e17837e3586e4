"""Vectors of low rank in Triton: finding them when a block is packed, and numbers made of them again."""

from __future__ import annotations

from kvdsl.scheme import LowRank

from .text import literal, plus
from .triton_factors import Factored, held_by
from .triton_pack import Pack
from .triton_unpack import Unpack


class FactoredUnpack(Factored, Unpack):
    """Decoded numbers: sums in float64 of exact products, so that their order decides nothing."""

    def decoded(self, half: int, tokens: str) -> list[str]:
        planes = range(self.side.layout.planes)
        vectors = f"{self.prefix}_vectors{'' if self.held.blocks == 1 else f' + {self.block(half)} * {self._vectors}'}"
        lines = [f"n{j} = tl.zeros([{self.plan.half}, {self.lanes}], tl.float64)" for j in planes]
        lines += [f"vectors = {vectors}", f"for i in range({self.held.rank}):"]
        loop = [f"number = tl.load({self.prefix}_rows + i * {self.plan.layout.page_tokens} + {tokens}).to(tl.float64)"]
        for j in planes:
            mask = f", mask={self.inside(j)}, other=0.0" if self.inside(j) else ""
            loop.append(f"one = tl.load(vectors + i * {self.side.dim} + {self.plane_lane(j)}{mask}).to(tl.float64)")
            loop.append(f"n{j} += number[:, None] * one[None, :]")
        return [*lines, *(f"    {line}" for line in loop), *(f"n{j} = n{j}.to(tl.float32)" for j in planes)]

    @property
    def _vectors(self) -> int:
        """Numbers of a block's vectors."""
        return self.held.rank * self.side.dim


class FactoredPack(Pack):
    """Finding rows and vectors of a block: subspace iteration in float64, the block read anew for every product."""

    def body(self) -> list[str]:
        side, held, planes = self.side, held_by(self.side), range(self.side.layout.planes)
        code = side.store.code
        assert isinstance(code, LowRank)
        ranks = range(held.rank)
        lines = ["spoilt = 0"]
        for j in planes:
            lines += [*self._numbers(j), "spoilt = tl.maximum(spoilt, tl.max(tl.max(nan(x), 1), 0))"]
            mask = f", mask={self.inside(j)}, other=0.0" if self.inside(j) else ""
            at = f"{side.space}_start_ptr + {self.plane_lane(j)}"
            lines += [f"b{i}_{j} = tl.load({at}{plus(i * side.dim)}{mask}).to(tl.float64)" for i in ranks]
        lines.append("# An orthonormal basis a of what the vectors give of the block; what the block gives of it.")
        lines += [f"a{i} = tl.zeros([{self.tokens}], tl.float64)" for i in ranks]
        lines.append(f"for loop in range({code.loops}):")
        lines += [f"    {line}" for line in self._iteration(ranks, planes)]
        return [*lines, *self._stores(ranks, planes, code.factor)]

    def _numbers(self, plane: int) -> list[str]:
        mask = self.mask("inside", plane)
        return [f"x = tl.load({self.at('source', plane)}, mask={mask}, other=0.0).to(tl.float32)"]

    def _iteration(self, ranks: range, planes: range) -> list[str]:
        lines = []
        for j in planes:
            lines += [*self._numbers(j), "number = finite(x).to(tl.float64)"]
            lines += [f"a{i} = {f'a{i} + ' if j else ''}tl.sum(number * b{i}_{j}[None, :], 1)" for i in ranks]
        for i in ranks:
            lines.append(f"whole = tl.sum(a{i} * a{i}, 0)")
            lines += [f"a{i} = without(a{i}, a{before})" for _ in range(2) for before in range(i)]
            lines.append(f"a{i} = unit(a{i}, whole)")
        for j in planes:
            lines += [*self._numbers(j), "number = finite(x).to(tl.float64)"]
            lines += [f"b{i}_{j} = tl.sum(number * a{i}[:, None], 0)" for i in ranks]
        return lines

    def _stores(self, ranks: range, planes: range, factor: float) -> list[str]:
        side, held, plan = self.side, held_by(self.side), self.plan
        base = f"pool16_ptr + page * {plan.layout.page_bytes // 2} + h * {plan.layout.head_bytes // 2}"
        lines = [f"rows = {base}{plus(held.offset // 2)} + t"]
        for i in ranks:
            lines.append(f"word = bits_fp16((a{i} * {literal(factor)}).to(tl.float32))")
            lines.append("word = tl.where(spoilt > 0, 0x7E00, word)")
            lines.append(f"tl.store(rows{plus(i * plan.layout.page_tokens)}, word.to(tl.int16), mask=inside)")
        block = f"step * {self.span} % {plan.layout.page_tokens} // {held.tokens}"
        start = f" + {block} * {held.rank * side.dim}" if held.blocks > 1 else ""
        lines.append(f"vectors = {base}{plus(held.vectors_offset // 2)}{start}")
        for i in ranks:
            for j in planes:
                mask = f", mask={self.inside(j)}" if self.inside(j) else ""
                lines.append(f"word = bits_fp16((b{i}_{j} * {literal(1 / factor)}).to(tl.float32))")
                at = f"vectors + {self.plane_lane(j)}{plus(i * side.dim)}"
                lines.append(f"tl.store({at}, word.to(tl.int16){mask})")
        return lines
