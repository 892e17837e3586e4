"""What queries are rounded to before they meet packed keys, in Triton: once for each, behind the keys' map.

A query is mapped as rows are that are packed, in float64 sums rounded once: what decides a code is the same number
everywhere.  A program has whole rows, so that no group of channels that share a scale is cut.
"""

from __future__ import annotations

from kvdsl.scheme import ALL

from .codec import call, settled
from .codec_text import unstored
from .plan import Plan, SidePlan
from .text import Lines, padded
from .triton_turn import query_as_rows, query_tile, rotated, stages_of, whole_arguments, whole_map, with_signs


def rounding(plan: Plan, queries: SidePlan) -> list[str]:
    """The texts of `turn_query` and of the functions that it calls: what packed keys meet, (B, Hq, Q, D) float32."""
    return [*unstored(queries, "tl."), _round(plan, queries), _turn(plan)]


def _round(plan: Plan, queries: SidePlan) -> str:
    rows, lanes = query_tile(plan.keys)
    out = Lines()
    out.add("@triton.jit")
    with out.deeper("def round_queries(x):"):
        out.add('"""What packed keys meet of queries x, a row each, float32."""')
        if queries.store.measure is None:
            out.add(f"return {call(queries, 'levels', [call(queries, 'encode', ['x'])])}")
            return str(out)
        channels = queries.scale.block.channels
        count = lanes if channels is ALL else channels
        assert isinstance(count, int)
        cut = count < lanes
        out.extend([f"x = tl.reshape(x, [{rows * lanes // count}, {count}])"] if cut else [])
        out.add("spoilt = tl.max(nan(x), 1)", "top = tl.max(top_of(x), 1)")
        out.add(f"scale = {call(queries, 'measure', ['top'])}[:, None]")
        out.extend(["x = finite(x)"] if settled(queries) else [])  # else coding does it
        out.add(f"x = {call(queries, 'levels', [call(queries, 'encode', ['x', 'scale'])])} * scale")
        spoilt = "spoil(x, spoilt[:, None])"
        out.add(f"return tl.reshape({spoilt}, [{rows}, {lanes}])" if cut else f"return {spoilt}")
    return str(out)


def _turn(plan: Plan) -> str:
    side, shape = plan.keys, plan.shape
    args = ["query_ptr", *(whole_arguments(side) if side.mapped else []), "turned_ptr"]
    bias, mapped, number = list[str](), list[str](), "y"
    if not side.mapped:
        number = "x"
    elif rotated(side):
        stages = stages_of(side)
        mapped = with_signs(side, "i", "x", "[None, :]")
        mapped.append(f"y = hadamard(x.to(tl.float64), {stages['stages']}, {stages['factor']}).to(tl.float32)")
    else:
        mapped = _times_matrix(side)
    if side.shifted:
        args.append("bias_ptr")
        shift = f"keys_decode_shift_ptr + h * keys_shifts * {shape.head_dim} + i"
        bias = [
            f"shift = tl.load({shift}, mask=i < {shape.head_dim}, other=0.0)",
            "tl.store(bias_ptr + place, tl.sum(x * shift[None, :], 1), mask=live)",
        ]
    return query_as_rows(plan, args, mapped, f"round_queries({number})", bias)


def _times_matrix(side: SidePlan) -> list[str]:
    """Lines that map rows one number at a time: y [rows, lanes], float32."""
    matrix, stride = whole_map(side)
    rows, lanes = query_tile(side)
    known = f"i < {side.row}" if padded(side.row) > side.row else ""
    mask = f", mask={known}, other=0.0" if known else ""
    return [
        f"matrix = {matrix} + h.to(tl.int64) * {stride} + i",
        f"y = tl.zeros([{rows}, {lanes}], tl.float64)",
        f"for d in tl.range(0, {side.row}, loop_unroll_factor=4):",
        f"    e = tl.load(query_ptr + place * {side.row} + d, mask=live, other=0.0).to(tl.float64)",
        f"    w = tl.load(matrix + d * {side.row}{mask}).to(tl.float64)",
        "    y = tl.fma(tl.broadcast_to(e[:, None], y.shape), tl.broadcast_to(w[None, :], y.shape), y)",
        "y = y.to(tl.float32)",
    ]
