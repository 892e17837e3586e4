"""Keys whose channels were mixed behind their rotary positions, mapped back in the loop over tokens, in Triton.

A score of such a key is q . R_t W y.  R_t differs from token to token, so W cannot leave the sum on the query: one
query for each token, W^T R_t^T q, takes rows * M * D products a token, and a product of the tensor cores would be of a
single token.  Mapping the decoded tile takes M * D for all rows, in tiles of whole tokens.  W is outer_d * inner_md
(`spaces.in_loop`), and `outer` goes onto the query, whose lanes are those of the channels d.

Where W is Hadamard's, H of all planes is H of the planes times H of one plane's lanes: one small matrix is multiplied
to each plane, then planes are added and subtracted.  That is as many times fewer products as there are planes, and the
matrix stays in registers.  Over G heads that are rotated together it is H of the heads times that: the numbers of all
are added up with the signs of the head's row, then mapped as those of one.

Numbers that lie in several stretches, or are fewer than the head has channels, have planes of their own beside those of
the channels, and each plane of channels adds up what all stretches give it.
"""

from __future__ import annotations

from .plan import Plan, SidePlan
from .text import plus
from .triton_planes import Planes
from .triton_turn import planes_added


def unseen(half: int = 0) -> str:
    """0, which the compiler does not see: what is the same in every tile, or `half` of one, and counted from it is not
    kept in registers through the loop.  A multiple of 16, so that it does not look as if rows were not aligned."""
    return f"(page >> {63 - half}) * 16"


def strung(side: SidePlan) -> bool:
    """Whether the numbers of keys that are mapped back in the loop do not lie in planes like those of channels."""
    return side.mixed and (side.band is not None or side.store.short)


class Unmap:
    """Lines that make b<plane>, channels of the head before their positions, of decoded n<plane>."""

    def __init__(self, plan: Plan, planes: Planes, operand: str, precise: str) -> None:
        self.plan, self.planes, self.side = plan, planes, planes.side
        self.operand, self.precise = operand, precise
        self.count = self.side.layout.planes
        self.dim = plan.shape.head_dim
        self.strung, self.readers = strung(self.side), [planes]
        self.butterflies = 0 if self.strung else self.side.butterflies

    def inputs(self) -> list[str]:
        """The arguments of a kernel that maps back."""
        return ["keys_inner_ptr", "keys_stride"]

    def prologue(self) -> list[str]:
        """What stays the same through the loop: the signs of the head's row."""
        if not self.butterflies:
            return []
        lines = list[str]()
        for head in range(1, self.side.joined):
            bits = [f"h >> {bit}" if bit else "h" for bit in range(head.bit_length()) if head >> bit & 1]
            odd = bits[0] if len(bits) == 1 else f"({' ^ '.join(bits)})"
            lines.append(f"sign{head} = (1 - 2 * ({odd} & 1)).to(tl.float32)")
        return lines

    def first(self, half: int) -> list[str]:
        """Lines before any numbers of a sub-tile: the matrix of one plane, which few registers are left for."""
        if not self.butterflies:
            return []
        return [f"sylvester = {self._block(f'keys_inner_ptr + {unseen(half)}', self.planes, 0, 0)}"]

    def taken(self, plane: int) -> list[str]:
        """Lines behind one plane of decoded numbers, where it need not wait for those of other heads."""
        return [self._small(plane)] if self.butterflies and self.side.joined == 1 else []

    def joined(self, reader: Planes) -> list[str]:
        """Lines behind the decoded numbers of one of several heads, or stretches."""
        if reader.head is None and not self.strung:
            return []
        if self.butterflies:
            sign = f"sign{reader.head}"
            return [f"n{j} = n{j} + n{reader.mark}{j} * {sign}" for j in range(self.count)] if reader.head else []
        if self.strung:
            return self._operands(reader)
        lines = [f"{self._inner()}{plus((reader.head or 0) * self.dim * self.dim)}"]
        lines += [f"c{j} = n{reader.mark}{j}.to({self.operand})" for j in range(self.count)]
        for of in range(self.count):
            lines += self._products(of, self.planes, first=not reader.head)
        return lines

    def _operands(self, reader: Planes) -> list[str]:
        planes = range(reader.side.layout.planes)
        return [f"c{reader.mark}{j} = n{reader.mark}{j}.to({self.operand})" for j in planes]

    def _block(self, base: str, reader: Planes, plane: int, of: int) -> str:
        """The load of the block of `inner` that takes a plane of a reader's numbers to a plane `of` channels."""
        row, column = f"{reader.plane_lane(plane)}[:, None]", f"{self.planes.plane_lane(of)}[None, :]"
        masks = [
            f"{name}[{axes}]"
            for name, axes in ((reader.inside(plane), ":, None"), (self.planes.inside(of), "None, :"))
            if name
        ]
        mask = f", mask={' & '.join(masks)}, other=0.0" if masks else ""
        return f"tl.load({base} + {row} * {self.dim} + {column}{mask})"

    def begin(self) -> list[str]:
        """Lines before the first plane of a tile."""
        if self.butterflies:
            small = [self._small(j) for j in range(self.count)] if self.side.joined > 1 else []
            return [*small, *planes_added("b", self.count, self.planes.width, self.butterflies)]
        if self.side.joined > 1:
            return []
        return [self._inner(), *([] if self.strung else self._operands(self.planes))]

    @staticmethod
    def _inner() -> str:
        return f"inner = keys_inner_ptr + h * keys_stride + {unseen()}"

    def _small(self, j: int) -> str:
        return f"b{j} = tl.dot(n{j}.to({self.operand}), sylvester{self.precise})"

    def _products(self, of: int, reader: Planes, *, first: bool = True) -> list[str]:
        """Add what numbers c<plane> of a reader give to b<of>, or begin it."""
        lines, base = [], f"inner{plus(reader.side.first * self.dim)}"
        for j in range(reader.side.layout.planes):
            so_far, number = f", b{of}" if j or not first else "", f"c{reader.mark}{j}"
            lines.append(f"b{of} = tl.dot({number}, {self._block(base, reader, j, of)}{so_far}{self.precise})")
        return lines

    def plane(self, of: int) -> list[str]:
        """b<of>, behind `begin`, in units of its lanes' `outer`."""
        if self.butterflies or self.side.joined > 1:
            return []
        return [line for i, reader in enumerate(self.readers) for line in self._products(of, reader, first=not i)]
