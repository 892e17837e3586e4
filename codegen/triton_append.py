"""Appending one token a sequence in place, in Triton: one launch a layer, whatever it packs.

A program owns one side of one kv head of one sequence.  It writes the token's exact row, and packs the blocks that
are due with it.  What is due stands on the device (StaticCache moves it on), so that a CUDA graph may hold the launch.
"""

from __future__ import annotations

from kvdsl.scheme import SIDES, Side

from .plan import Plan, SidePlan
from .text import fill, padded
from .triton_names import kept_rows
from .triton_pack import Pack

APPEND = """
@triton.jit(do_not_specialize=["table_width", "ring"])
def append(
    fresh_keys_ptr,
    fresh_values_ptr,
    key_rows_ptr,
    value_rows_ptr,
    length_ptr,
    $args
    table_width,
    ring,
):
    bh = tl.program_id(0)
    b = bh // $heads
    t = tl.load(length_ptr + b) - 1
    row = bh.to(tl.int64) * $total + $row
    d = tl.arange(0, $lanes)
    if tl.program_id(1) == 0:
        $keys
    else:
        $values
"""

WRITE = """
number = tl.load(fresh_${side}_ptr + bh.to(tl.int64) * $head_dim + d$mask)
tl.store($rows + row * $head_dim + d, number$mask)
"""

# A block's rows are read by all threads of the program, the fresh one that one of them has written among them.
KEEP = """
tl.debug_barrier()
begin = tl.load(packed_${side}_ptr + b)
end = tl.load(due_${side}_ptr + b)
for step in range(begin // $span, (end + $span_less) // $span):
    keep_$label(
        step,
        bh,
        begin,
        end,
        0,
        $args
    )
"""


def packs(side: SidePlan) -> tuple[SidePlan, ...]:
    """What `append` packs of a side's blocks as well, all of it or nothing: codes of the numbers as they are, each
    head's own."""
    plain = not (side.turned or side.factors or side.slots or side.beside or side.parted or side.residual)
    metas = [term.layout.meta for term in side.parts]
    own = plain and not side.shared and all(meta is None or meta.heads == 1 for meta in metas)
    return side.parts if own else ()


def append(plan: Plan) -> str:
    """The text of `append`."""
    sides = (plan.keys, plan.values)
    args, keeps = list[str](), dict[Side, list[str]]()
    for name, side in zip(SIDES, sides, strict=True):
        rows, keeps[name] = ROWS[name], []
        for term in packs(side):
            pack = Pack(plan, term)
            pack.text()
            args += [f"packed_{name}_ptr", f"due_{name}_ptr", *pack.arguments]
            given = [_given(plan, rows, one) for one in pack.arguments]
            holes: dict[str, str | int] = {"side": name, "label": term.label, "span": term.span}
            holes["span_less"] = term.span - 1
            keeps[name] += fill(KEEP, **holes, args=[f"{one}," for one in given]).splitlines()
    lanes, sinks = padded(plan.shape.head_dim), plan.sinks
    known = {"rows_ptr", "total_rows", "offset", "ring", "table_width"}
    own = [one for one in dict.fromkeys(args) if one not in known]
    total = kept_rows(plan)
    writes = {
        name: fill(
            WRITE,
            side=name,
            rows=ROWS[name],
            head_dim=side.channels,
            mask="" if side.channels == lanes else f", mask=d < {side.channels}",
        ).splitlines()
        + keeps[name]
        for name, side in zip(SIDES, sides, strict=True)
    }
    return fill(
        APPEND, args=[f"{one}," for one in own], heads=plan.shape.kv_heads, total=total, lanes=lanes,
        row=f"tl.where(t < {sinks}, t, {sinks} + (t - {sinks}) % ring)" if sinks else "t % ring", **writes,
    )  # fmt: skip


ROWS: dict[Side, str] = {"keys": "key_rows_ptr", "values": "value_rows_ptr"}


def _given(plan: Plan, rows: str, name: str) -> str:
    """What `append` gives for an argument of `keep_<side>`."""
    return {
        "rows_ptr": rows,
        "total_rows": kept_rows(plan),
        "offset": str(plan.sinks),
    }.get(name, name)
