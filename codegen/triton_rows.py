"""Exact rows of a side whose codes are of a mapped vector, in Triton: they meet the query itself, and add to the output
itself, in tiles of their own."""

from __future__ import annotations

from .plan import Plan, SidePlan
from .text import plus
from .triton_abreast import masked


class ExactRows:
    """Keys lie [tokens, lanes], values [lanes, tokens], as for packed tokens."""

    def __init__(self, plan: Plan, side: SidePlan, operand: str, precise: str) -> None:
        self.plan, self.side, self.operand, self.precise = plan, side, operand, precise
        self.dim = plan.shape.head_dim
        self.width = max(16, min(32, self.dim & -self.dim))
        self.planes = range(-(-self.dim // self.width))
        self.lane = f"{side.name[0]}_row"

    @property
    def ragged(self) -> bool:
        """The last tile is wider than what is left of the vector."""
        return self.dim % self.width != 0

    def lanes(self) -> list[str]:
        return [f"{self.lane} = tl.arange(0, {self.width})"]

    def _lane(self, j: int) -> str:
        return f"({self.lane} + {j * self.width})" if j else self.lane

    def _inside(self, j: int, index: str) -> str:
        """The mask of a tile's lanes, where it needs one."""
        left = self.dim - j * self.width
        return f" & ({self.lane} < {left}){index}" if left < self.width else ""

    # ---- keys ----------------------------------------------------------------------------------------------------

    def queries(self) -> list[str]:
        """Loads of the query rows, r0, r1, ... [lanes, rows]."""
        return [
            f"r{j} = tl.load(query + {self._lane(j)}[:, None], "
            f"mask=live[None, :]{self._inside(j, '[:, None]')}, other=0.0).to(tl.float32) * scaling"
            for j in self.planes
        ]

    def scores(self, there: str) -> list[str]:
        """r = scores of exact rows, where a mask says that they are there."""
        lines = [f"source = key_rows + row[:, None] * {self.dim} + {self.lane}[None, :]"]
        for j in self.planes:
            at = f"source{plus(j * self.width)}"
            mask = f"{there}[:, None]{self._inside(j, '[None, :]')}"
            lines.append(f"k = tl.load({at}, mask={mask}, other=0.0).to(tl.float32).to({self.operand})")
            lines.append(f"r = tl.dot(k, f{j}{', r' if j else ''}{self.precise})")
        return lines

    # ---- values --------------------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        return [f"g{j}" for j in self.planes]

    def accumulators(self) -> list[str]:
        return [f"{name} = tl.zeros([{self.width}, ROWS], tl.float32)" for name in self.names()]

    def accumulate(self, there: str) -> list[str]:
        """Add exact rows, where a mask says that they are there, under `weight` to sums that have decayed."""
        lines = [f"source = value_rows + row[None, :] * {self.dim} + {self.lane}[:, None]"]
        for j in self.planes:
            at = f"source{plus(j * self.width)}"
            mask = f"{there}[None, :]{self._inside(j, '[:, None]')}"
            lines.append(f"v = tl.load({at}, mask={mask}, other=0.0).to(tl.float32).to({self.operand})")
            lines.append(f"g{j} = tl.dot(v, weight, g{j}{self.precise})")
        return lines

    def stores(self, once: str) -> list[str]:
        """Store the sums of exact rows; `once`: the mask of the columns that are."""
        lines = [f"exact_out = exact_ptr + slot[None, :] * {self.dim} + {self.lane}[:, None]"]
        for j in self.planes:
            left = self.dim - j * self.width
            masks = [f"{once}[None, :]"] * bool(once)
            masks += [f"({self.lane} < {left})[:, None]"] * (left < self.width)
            stored = f"g{j} * inverse[None, :]{masked(' & '.join(masks))}"
            lines.append(f"tl.store(exact_out{plus(j * self.width)}, {stored})")
        return lines
