"""The merge of a query's partial outputs, in Triton: weighted by their log-sum-exps, in the model's dtype."""

from __future__ import annotations

from .plan import Plan
from .text import fill, padded
from .triton_turn import whole_arguments, whole_map

MERGE_LANES = 32  # coded numbers that are mapped back at a time

MERGE = """
@triton.jit(do_not_specialize=[$loose])
def merge(
    $args
):
    head = tl.program_id(0)
    token = tl.program_id(1)
    b = head // $q_heads
    h = head % $q_heads // $group
    row = token * $group + head % $group
    s = tl.arange(0, SPLITS)
    d = tl.arange(0, $lanes)
    $place
    lse = tl.load(lse_ptr + place, mask=s < splits, other=-1.0e30)
    most = tl.max(lse, 0)
    weight = tl.where(lse > -1.0e29, tl.exp2(lse - most), 0.0)
    mass = tl.sum(weight, 0)
    $sum
    where = head.to(tl.int64) * queries + token
    tl.store(out_ptr + where * $head_dim + d, $result, mask=d < $head_dim)
    natural = (most + tl.log2(tl.where(mass > 0.0, mass, 1.0))) * 0.6931471805599453
    tl.store(out_lse_ptr + where, tl.where(mass > 0.0, natural, float("-inf")))
"""

PLACE = """
place = ((b * $heads + h).to(tl.int64) * blocks + row // ROWS) * splits + s
place = place * ROWS + row % ROWS
"""

SUM = """
part = tl.load(
    partial_ptr + place[:, None] * $head_dim + d[None, :],
    mask=((s < splits) & (weight > 0.0))[:, None] & (d < $head_dim)[None, :],
    other=0.0,
)
total = tl.sum(part * weight[:, None], 0) / tl.where(mass > 0.0, mass, 1.0)
"""

# Where exact tokens add to the output itself, they have sums of their own.
APART_PLACE = """
base = (b * $heads + h).to(tl.int64) * blocks + row // ROWS
place = (base * splits + s) * ROWS + row % ROWS
slot = (base * (splits - clean) + tl.maximum(s - clean, 0)) * ROWS + row % ROWS
"""

APART_SUM = """
exact = tl.load(
    exact_ptr + slot[:, None] * $head_dim + d[None, :],
    mask=((s >= clean) & (s < splits) & (weight > 0.0))[:, None] & (d < $head_dim)[None, :],
    other=0.0,
)
total = tl.sum(exact * weight[:, None], 0)
"""

# Sums over packed tokens are of coded numbers: they are mapped back here, once.
TURNED_SUM = """
$exact
matrix = $matrix_ptr + h.to(tl.int64) * $stride
for first in range(0, $dim, $step):
    i = first + tl.arange(0, $step)
    part = tl.load(
        partial_ptr + place[:, None] * $dim + i[None, :],
        mask=((s < splits) & (weight > 0.0))[:, None] & (i < $dim)[None, :],
        other=0.0,
    )
    coded = tl.sum(part * weight[:, None], 0)
    known = (d < $head_dim)[:, None] & (i < $dim)[None, :]
    w = tl.load(matrix + d.to(tl.int64)[:, None] * $dim + i[None, :], mask=known, other=0.0)
    total = total + tl.sum(w * coded[None, :], 1)
$shift
total = total / tl.where(mass > 0.0, mass, 1.0)
"""

SHIFT = """
share = tl.load(share_ptr + slot, mask=(s >= clean) & (s < splits) & (weight > 0.0), other=0.0)
share = tl.sum(tl.where(s < clean, weight, share * weight), 0)
shift = tl.load(values_decode_shift_ptr + h * values_shifts * $head_dim + d, mask=d < $head_dim, other=0.0)
total = total + shift * share
"""


def merge(plan: Plan) -> str:
    """The text of `merge`."""
    shape, values = plan.shape, plan.values
    holes: dict[str, str | int] = {"heads": shape.kv_heads, "head_dim": shape.head_dim}
    result = {"fp16": "total.to(tl.float16)", "fp32": "total", "bf16": "bits_bf16(total).to(tl.int16)"}[shape.dtype]
    if values.through:
        turned = {**holes, "dim": values.row, "step": min(MERGE_LANES, padded(values.row))}
        turned |= {"matrix_ptr": whole_map(values)[0], "stride": whole_map(values)[1]}
        shift = fill(SHIFT, head_dim=shape.head_dim).splitlines() if values.shifted else []
        exact = [f"total = tl.zeros([{padded(shape.head_dim)}], tl.float32)"]
        exact = fill(APART_SUM, **holes).splitlines() if values.apart else exact
        place = fill(APART_PLACE if values.apart else PLACE, **holes)
        total = fill(TURNED_SUM, **turned, exact=exact, shift=shift)
        args = ["partial_ptr", *(["exact_ptr"] if values.apart else []), *(["share_ptr"] if values.shifted else [])]
        args += ["lse_ptr", *whole_arguments(values), "out_ptr", "out_lse_ptr", "queries", "blocks", "splits"]
        args += ["clean"] if values.apart else []
        args = [f"{name}," for name in [*args, "ROWS: tl.constexpr", "SPLITS: tl.constexpr"]]
        loose = '"queries", "splits", "blocks"' + ', "clean"' * values.apart
    else:
        place, total = fill(PLACE, **holes), fill(SUM, **holes)
        args = ["partial_ptr, lse_ptr, out_ptr, out_lse_ptr, queries, blocks, splits, ROWS: tl.constexpr,"]
        args[0] += " SPLITS: tl.constexpr"
        loose = '"queries", "splits", "blocks"'
    return fill(
        MERGE, loose=loose, args=args, q_heads=str(shape.q_heads), group=shape.group, lanes=padded(shape.head_dim),
        head_dim=shape.head_dim, place=place.splitlines(), sum=total.splitlines(), result=result,
    )  # fmt: skip
