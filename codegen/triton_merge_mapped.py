"""The merge of partial outputs that are sums of coded numbers, which a map takes to the head's own, in Triton.

A program has some rows of one kv head, of all sequences, and a few channels of their outputs: the part of the map that
makes these is read once for all of its rows, and asked for before there are partials.  Of many numbers it has some at
a time, and asks for the next ones before it adds these.  Of a rotation see
`triton_merge`.
"""

from __future__ import annotations

from .plan import Plan
from .text import fill
from .triton_turn import whole_arguments, whole_map

RESULTS = {"fp16": "total.to(tl.float16)", "fp32": "total", "bf16": "bits_bf16(total).to(tl.int16)"}
"""A model's dtype -> what is stored of outputs."""

MERGE = """
@triton.jit(do_not_specialize=[$loose])
def $name(
    $args
):
    h = tl.program_id(1)
    r = tl.program_id(0) * MERGED + tl.arange(0, MERGED)
    live = r < batch * queries * $group
    b = r // (queries * $group)
    row = r % (queries * $group)
    s = tl.arange(0, SPLITS)
    d = tl.program_id(2) * LANES + tl.arange(0, LANES)
    programs = batch * $heads * blocks  # that a split has
    base = (b * $heads + h) * blocks + row // ROWS
    place = (s.to(tl.int64)[None, :] * programs + base[:, None]) * ROWS + (row % ROWS)[:, None]
    $exact_place
    matrix = $matrix_ptr + h.to(tl.int64) * $stride + tl.minimum(d, $last)[:, None] * $dim
    i = tl.arange(0, STEP)
    w = tl.load(matrix + i[None, :], mask=(i < $dim)[None, :], other=0.0)
    await_last()
    given = live[:, None] & (s < splits)[None, :]
    lse = tl.load(lse_ptr + place, mask=given, other=-1.0e30)
    partial = partial_ptr + place[:, :, None] * $dim
    part = tl.load(partial + i[None, None, :], mask=given[:, :, None] & (i < $dim)[None, None, :], other=0.0)
    $exact_loads
    most = tl.max(lse, 1)
    weight = tl.where(lse > -1.0e29, tl.exp2(lse - most[:, None]), 0.0)
    mass = tl.sum(weight, 1)
    $exact_sum
    for first in range(STEP, $dim, STEP):
        i = first + tl.arange(0, STEP)
        next_w = tl.load(matrix + i[None, :], mask=(i < $dim)[None, :], other=0.0)
        next_part = tl.load(partial + i[None, None, :], mask=given[:, :, None] & (i < $dim)[None, None, :], other=0.0)
        coded = tl.sum(tl.where((weight > 0.0)[:, :, None], part * weight[:, :, None], 0.0), 1)
        total = with_mapped(total, coded, w)
        w, part = next_w, next_part
    coded = tl.sum(tl.where((weight > 0.0)[:, :, None], part * weight[:, :, None], 0.0), 1)
    total = with_mapped(total, coded, w)
    $shift
    total = total * reciprocal(tl.where(mass > 0.0, mass, 1.0))[:, None]
    found = most + logarithm(tl.where(mass > 0.0, mass, 1.0))
    $end
"""

# Where exact tokens add to the output itself, they have sums of their own, of the programs behind the clean pages'.
EXACT_PLACE = """
e = tl.arange(0, EDGES)
slot = (e.to(tl.int64)[None, :] * programs + base[:, None]) * ROWS + (row % ROWS)[:, None]
"""

EXACT_LOADS = """
ours = live[:, None] & (e < splits - clean)[None, :]
exact_lse = tl.load(lse_ptr + slot + clean.to(tl.int64) * programs * ROWS, mask=ours, other=-1.0e30)
exact = tl.load(
    exact_ptr + slot[:, :, None] * $head_dim + d[None, None, :],
    mask=ours[:, :, None] & (d < $head_dim)[None, None, :],
    other=0.0,
)
"""

EXACT_SUM = """
exact_weight = tl.where(exact_lse > -1.0e29, tl.exp2(exact_lse - most[:, None]), 0.0)
total = tl.sum(tl.where((exact_weight > 0.0)[:, :, None], exact * exact_weight[:, :, None], 0.0), 1)
"""

SHIFT = """
share = tl.load(share_ptr + slot, mask=ours & (exact_weight > 0.0), other=0.0)
share = tl.sum(tl.where((s < clean)[None, :], weight, 0.0), 1) + tl.sum(share * exact_weight, 1)
shift = tl.load(values_decode_shift_ptr + h * values_shifts * $head_dim + d, mask=d < $head_dim, other=0.0)
total = total + shift[None, :] * share[:, None]
"""

OUTPUT = """
head = b * $q_heads + h * $group + row % $group
where = head.to(tl.int64) * queries + row // $group
tl.store(out_ptr + where[:, None] * $head_dim + d[None, :], $result, mask=live[:, None] & (d < $head_dim)[None, :])
tl.store(out_lse_ptr + where, tl.where(mass > 0.0, found * 0.6931471805599453, float("-inf")), mask=live)
"""

PARTIAL = """
where = ((b * $heads + h).to(tl.int64) * to_blocks + row // TO_ROWS) * TO_ROWS + row % TO_ROWS
tl.store(to_ptr + where[:, None] * $head_dim + d[None, :], total, mask=live[:, None] & (d < $head_dim)[None, :])
tl.store(to_lse_ptr + where, tl.where(mass > 0.0, found, -1.0e30), mask=live)
"""


def mapped_merge(plan: Plan, name: str, into: str) -> str:
    """A merge of sums of coded numbers `into` outputs ("out") or one partial ("to")."""
    shape, values = plan.shape, plan.values
    apart, shifted = values.apart, values.shifted
    holes: dict[str, str | int] = {
        "heads": shape.kv_heads, "head_dim": values.channels, "group": shape.group, "q_heads": str(shape.q_heads),
    }  # fmt: skip
    matrix, stride = whole_map(values)
    args = ["partial_ptr", *["exact_ptr"] * apart, *["share_ptr"] * shifted, "lse_ptr", *whole_arguments(values)]
    args += [f"{into}_ptr", f"{into}_lse_ptr", "batch", "queries", "blocks", "splits", *["clean"] * apart]
    args += ["to_blocks"] * (into == "to")
    loose = [name for name in ("batch", "queries", "splits", "blocks", "clean", "to_blocks") if name in args]
    constants = ["ROWS", "SPLITS", *["EDGES"] * apart, "LANES", "MERGED", "STEP", *["TO_ROWS"] * (into == "to")]
    args += [f"{constant}: tl.constexpr" for constant in constants]
    total = fill(EXACT_SUM).splitlines() if apart else ["total = tl.zeros([MERGED, LANES], tl.float32)"]
    end = fill(OUTPUT if into == "out" else PARTIAL, **holes, result=RESULTS[shape.dtype])
    return fill(
        MERGE, name=name, loose=", ".join(f'"{one}"' for one in loose), args=[f"{arg}," for arg in args], **holes,
        exact_place=fill(EXACT_PLACE).splitlines() * apart, exact_sum=total,
        exact_loads=fill(EXACT_LOADS, **holes).splitlines() * apart,
        shift=fill(SHIFT, **holes).splitlines() * shifted, matrix_ptr=matrix, stride=stride, dim=values.row,
        last=values.channels - 1, end=end.splitlines(),
    )  # fmt: skip
