"""Reading pages back in Triton: the unpack kernels of either side, decoded numbers one by one."""

from __future__ import annotations

from .plan import Plan, SidePlan
from .text import Lines, fill, plus
from .triton_attend import parameters, pools
from .triton_names import tokens_name
from .triton_planes import Planes
from .triton_vectors import first_channel

UNPACK = """
@triton.jit(do_not_specialize=["begin", "end", "table_width"])
def unpack_$side($args):
    step = tl.program_id(0) + begin // $tile
    bh = tl.program_id(1)
    b = bh // $heads
    h = bh % $heads
    page = tl.load(table_ptr + b.to(tl.int64) * table_width + step * $tile // $page).to(tl.int64)
    page_token = step * $tile % $page
    $lanes
    $addresses
    out = out_ptr + bh.to(tl.int64) * (end - begin) * $head_dim
    $halves
"""


class Unpack(Planes):
    """Prints `unpack_keys` or `unpack_values`: decoded numbers, one by one, as float32."""

    def __init__(self, plan: Plan, side: SidePlan) -> None:
        super().__init__(plan, side)
        self.transposed = False

    def decoded(self, half: int, tokens: str) -> list[str]:
        """n0, n1, ... of the tokens of sub-tile `half`, decoded."""
        return [*self.load(half, tokens), *self.decode(half, tokens)]

    def foreign(self) -> tuple[str, ...]:
        """How addresses of other terms begin."""
        own = ("meta", "rows", "coded", "floats", "vectors", "numbers", "places", "channels", "across")
        return tuple(f"{term.letter}_{name}" for term in self.plan.terms if term is not self.side for name in own)

    def text(self, addresses: list[str]) -> str:
        plan, side, halves = self.plan, self.side, Lines()
        for half in range(plan.halves):
            t = tokens_name(plan, half)
            shift = f" + {half * plan.half}" if half else ""
            halves.add(f"u = step * {plan.tile}{shift} + tl.arange(0, {plan.half})")
            halves.add("inside = (u >= begin) & (u < end)")
            if side.floats:
                at = f"{side.rows} + {t}[:, None] * {side.dim} + {self.lane}[None, :]"
                for j in range(side.layout.planes):
                    mask = self.mask("inside", j)
                    halves.add(f"n{j} = tl.load({at} + {self.start(j)}, mask={mask}, other=0.0).to(tl.float32)")
            else:
                halves.extend(self.decoded(half, t))
            first = plus(side.first) if side.band else ""
            halves.add(f"place = out + (u - begin)[:, None] * {side.stride} + {first_channel(self)}[None, :]{first}")
            for j in range(side.layout.planes):
                halves.add(f"tl.store({self.at('place', j)}, n{j}, mask={self.mask('inside', j)})")
        keep = [a for a in addresses if not a.startswith((*self.foreign(), "page_token"))]
        text = "\n".join([*keep, *halves.lines])
        args = [p for p in pools(plan) if p in text] + ["table_ptr"]
        args += [p for p in parameters(plan) if p.startswith(f"{side.label}_")]
        args += ["out_ptr", "begin", "end", "table_width"]
        return fill(
            UNPACK, side=side.label, args=", ".join(args), heads=plan.shape.kv_heads, tile=plan.tile,
            page=plan.layout.page_tokens, head_dim=side.stride, lanes=self.lane_lines(), addresses=keep,
            halves=halves.lines,
        )  # fmt: skip
