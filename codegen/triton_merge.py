"""The merge of a query's partial outputs, in Triton: weighted by their log-sum-exps.

Partials stand by split, then by program, then by row, so that of several segments of a cache each has a stretch of one
buffer.  `merge` ends a step.  Partials that cannot stand among those of other segments (sums of coded numbers, another
number of rows a program) become one that can by `collect`; where no segment has others `unite` ends the step.
"""

from __future__ import annotations

from .plan import Plan
from .text import fill, padded
from .triton_merge_mapped import RESULTS, mapped_merge
from .triton_turn import rotated, stages_of, whole_arguments, with_signs

MERGE = """
@triton.jit(do_not_specialize=[$loose])
def $name(
    $args
):
    head = tl.program_id(0)
    token = tl.program_id(1)
    b = head // $q_heads
    h = head % $q_heads // $group
    row = token * $group + head % $group
    s = tl.arange(0, SPLITS)
    d = $lanes
    $place
    await_last()
    lse = tl.load(lse_ptr + place, mask=s < splits, other=-1.0e30)
    $loads
    most = tl.max(lse, 0)
    weight = tl.where(lse > -1.0e29, tl.exp2(lse - most), 0.0)
    mass = tl.sum(weight, 0)
    $sum
    found = most + logarithm(tl.where(mass > 0.0, mass, 1.0))
    $end
"""

OUTPUT = """
where = head.to(tl.int64) * queries + token
tl.store(out_ptr + where * $head_dim + d, $result, mask=d < $head_dim)
tl.store(out_lse_ptr + where, tl.where(mass > 0.0, found * 0.6931471805599453, float("-inf")))
"""

PARTIAL = """
where = ((b * $heads + h).to(tl.int64) * to_blocks + row // TO_ROWS) * TO_ROWS + row % TO_ROWS
tl.store(to_ptr + where * $head_dim + d, total, mask=d < $head_dim)
tl.store(to_lse_ptr + where, tl.where(mass > 0.0, found, -1.0e30))
"""

PLACE = """
programs = tl.num_programs(0) // $group * blocks  # that a split has
base = (b * $heads + h) * blocks + row // ROWS
place = (s.to(tl.int64) * programs + base) * ROWS + row % ROWS
"""

# Asked for before it is known which weigh anything: a step waits for memory once here, and not twice.
LOADS = """
part = tl.load(
    partial_ptr + place[:, None] * $dim + d[None, :],
    mask=(s < splits)[:, None] & (d < $dim)[None, :],
    other=0.0,
)
"""

SUM = """
part = tl.where((weight > 0.0)[:, None], part * weight[:, None], 0.0)
total = tl.sum(part, 0) * reciprocal(tl.where(mass > 0.0, mass, 1.0))
"""

# Where exact tokens add to the output itself, they have sums of their own, of the programs behind the clean pages'.
APART_PLACE = (
    PLACE
    + """\
e = tl.arange(0, EDGES)
slot = (e.to(tl.int64) * programs + base) * ROWS + row % ROWS
"""
)

APART_LOADS = """
ours = e < splits - clean
exact_lse = tl.load(lse_ptr + slot + clean.to(tl.int64) * programs * ROWS, mask=ours, other=-1.0e30)
exact = tl.load(
    exact_ptr + slot[:, None] * $head_dim + d[None, :], mask=ours[:, None] & (d < $head_dim)[None, :], other=0.0
)
"""

APART_SUM = """
exact_weight = tl.where(exact_lse > -1.0e29, tl.exp2(exact_lse - most), 0.0)
total = tl.sum(tl.where((exact_weight > 0.0)[:, None], exact * exact_weight[:, None], 0.0), 0)
"""

# Sums over packed tokens are of coded numbers: a rotation is undone here, once; other maps: `triton_merge_mapped`.
ROTATED_SUM = """
$exact
coded = tl.sum(tl.where((weight > 0.0)[:, None], part * weight[:, None], 0.0), 0)
coded = tl.reshape(hadamard(coded[None, :], $stages, $factor), d.shape)
$signs
total = (total + coded) * reciprocal(tl.where(mass > 0.0, mass, 1.0))
"""


def merge(plan: Plan) -> str:
    """The text of `merge`: partials to outputs."""
    return _text(plan, "merge", plan.values.through, "out")


def collect(plan: Plan) -> str:
    """The text of `collect`: partials to one of the head's own numbers, in float32."""
    return _text(plan, "collect", plan.values.through, "to")


def unite(plan: Plan) -> str:
    """The text of `unite`: partials of the head's own numbers to outputs."""
    return _text(plan, "unite", False, "out")


def _text(plan: Plan, name: str, through: bool, into: str) -> str:
    """A merge: `through` the map of the values, `into` outputs or one partial."""
    shape, values = plan.shape, plan.values
    if through and not rotated(values):
        return mapped_merge(plan, name, into)
    dim = values.channels
    holes: dict[str, str | int] = {"heads": shape.kv_heads, "head_dim": dim, "group": shape.group}
    apart = through and values.apart
    sources = whole_arguments(values) if through else []
    place, total = fill(APART_PLACE if apart else PLACE, **holes), fill(SUM)
    loads = fill(APART_LOADS, **holes) * apart
    loads += fill(LOADS, dim=values.row if through else dim)
    if through:
        exact = [f"total = tl.zeros([{padded(dim)}], tl.float32)"]
        exact = fill(APART_SUM).splitlines() if apart else exact
        rotation = {**stages_of(values), "signs": with_signs(values, "d", "coded")}
        if plan.adds_planes:  # what is left are blocks within a plane
            rotation["stages"] = min(values.hadamard, values.layout.plane_width).bit_length() - 1
        total = fill(ROTATED_SUM, **rotation, exact=exact)
    args = ["partial_ptr", *["exact_ptr"] * apart, "lse_ptr", *sources, f"{into}_ptr"]
    args += [f"{into}_lse_ptr", "queries", "blocks", "splits", *["clean"] * apart, *["to_blocks"] * (into == "to")]
    loose = [name for name in ("queries", "splits", "blocks", "clean", "to_blocks") if name in args]
    args += ["ROWS: tl.constexpr", "SPLITS: tl.constexpr", *["EDGES: tl.constexpr"] * apart]
    parted = not through or plan.adds_planes
    args += [*["LANES: tl.constexpr"] * parted, *["TO_ROWS: tl.constexpr"] * (into == "to")]
    lanes = "tl.program_id(2) * LANES + tl.arange(0, LANES)" if parted else f"tl.arange(0, {padded(dim)})"
    end = fill(OUTPUT if into == "out" else PARTIAL, **holes, result=RESULTS[shape.dtype])
    return fill(
        MERGE, name=name, loose=", ".join(f'"{one}"' for one in loose), args=[f"{arg}," for arg in args],
        q_heads=str(shape.q_heads), **holes, lanes=lanes, place=place.splitlines(),
        loads=loads.splitlines(), sum=total.splitlines(), end=end.splitlines(),
    )  # fmt: skip
