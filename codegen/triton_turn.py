"""Maps between a head's vector and what is coded of it, in Triton: rows before packing, queries, decoded rows back.

A Hadamard rotation takes log2(size) sums a number, any other matrix as many products as a vector has numbers.  Sums run
in float64 where their result is stored or given back: products of float32 numbers are exact there, so their
order decides nothing.  Queries are summed in float32, and outputs.
"""

from __future__ import annotations

import math
import struct

from .codec import made
from .plan import WORD, Plan, SidePlan, drawn
from .text import fill, literal, padded, plus
from .triton_gather import gathers, stride, where_gathered
from .triton_planes import Planes

TURN_ROWS = 32  # tokens of a program
TURN_LANES = 128  # numbers of the result of a program
# Numbers of a program that rotates: a warp of its own has them all, so that they are exchanged without a barrier.
ROTATED = 1024
QUERY_ROWS, QUERY_LANES = 16, 32  # query rows of a program, and numbers of the result

# One row of the source at a time would wait for memory; a whole tile of products would not fit: one number of every
# row against one column of the map, whose numbers are neighbours, and float64 already as conversions are slow.
TURN = """
@triton.jit(do_not_specialize=[$loose])
def $name($args):
    n = tl.program_id(0) * $rows + tl.arange(0, $rows)
    bh = tl.program_id(1)
    i = tl.program_id(2) * $lanes + tl.arange(0, $lanes)
    b = bh // $heads
    h = bh % $heads
    $where
    $source
    matrix = $matrix_ptr + h.to(tl.int64) * $stride + i
    y = tl.zeros([$rows, $lanes], tl.float64)
    $squares
    for d in tl.range(0, $numbers, loop_unroll_factor=4):
        x = tl.load($at, mask=inside, other=0.0).to(tl.float32)
        $clean
        x = x.to(tl.float64)
        e = tl.load(matrix + d * $given, mask=i < $given, other=0.0)
        y = tl.fma(tl.broadcast_to(x[:, None], y.shape), tl.broadcast_to(e[None, :], y.shape), y)
        $squared
    $shift
    out = out_ptr + (bh.to(tl.int64) * count + n)[:, None] * $given + i[None, :]
    tl.store(out, y.to(tl.float32), mask=inside[:, None] & (i < $given)[None, :])
    $stored
"""

# Whole vectors, of which a row's numbers are neighbours.
ROTATE = """
@triton.jit(do_not_specialize=[$loose])
def $name($args):
    n = tl.program_id(0) * $rows + tl.arange(0, $rows)
    bh = tl.program_id(1)
    i = tl.arange(0, $lanes)
    b = bh // $heads
    h = bh % $heads
    $where
    known = inside[:, None] & (i < $dim)[None, :]
    x = tl.load($source + row[:, None] * $dim + i[None, :], mask=known, other=0.0).to(tl.float32)
    $clean
    $before
    y = hadamard(x.to(tl.float64), $stages, $factor)
    $spread
    y = y.to(tl.float32)
    $after
    tl.store(out_ptr + (bh.to(tl.int64) * count + n)[:, None] * $dim + i[None, :], y, mask=known)
"""

QUERY = """
@triton.jit(do_not_specialize=["batch", "queries", "soon"])
def turn_query($args):
    if soon:
        let_next_begin()
    $whose
    i = tl.program_id(1) * $lanes + tl.arange(0, $lanes)
    d = tl.arange(0, $padded)
    known = d < $taken
    q = tl.load(
        query_ptr + place[:, None] * $taken + d[None, :], mask=live[:, None] & known[None, :], other=0.0
    ).to(tl.float32)
    matrix = $matrix_ptr + h.to(tl.int64) * $stride
    w = tl.load(
        matrix + d.to(tl.int64)[:, None] * $given + i[None, :], mask=known[:, None] & (i < $given)[None, :], other=0.0
    )
    y = $product
    let_next_begin()
    tl.store(turned_ptr + place[:, None] * $given + i[None, :], y, mask=live[:, None] & (i < $given)[None, :])
    $bias
    $gathered
"""

# Whole rows, by lines that give what is stored of rows x.
QUERY_AS_ROWS = """
@triton.jit(do_not_specialize=["batch", "queries", "soon"])
def turn_query($args):
    if soon:
        let_next_begin()
    $whose
    i = tl.arange(0, $lanes)
    known = live[:, None] & (i < $dim)[None, :]
    x = tl.load(query_ptr + place[:, None] * $dim + i[None, :], mask=known, other=0.0).to(tl.float32)
    $kept
    $mapped
    let_next_begin()
    tl.store(turned_ptr + place[:, None] * $dim + i[None, :], $stored, mask=known)
    $bias
    $gathered
"""


def entry(size: int) -> float:
    """The size of every entry of a Hadamard rotation, a float32 number."""
    (found,) = struct.unpack("<f", struct.pack("<f", 1 / math.sqrt(size)))
    return float(found)


def turn_rows(side: SidePlan) -> int:
    """Tokens of a program."""
    return max(1, ROTATED // padded(side.stride)) if side.hadamard else TURN_ROWS


def _rotate(plan: Plan, side: SidePlan, name: str, **holes: list[str] | str | int) -> str:
    dim, size, lanes, back = side.stride, side.hadamard, padded(side.stride), name.startswith("restore")
    signs = with_signs(side, "i", "y" if back else "x", "[None, :]")
    # A number of one block that is not finite reaches those of the others as a product with 0.
    spread = ["y = y + tl.sum(x * 0.0, 1).to(tl.float64)[:, None]"] if size < dim else []
    return fill(
        ROTATE, name=name, rows=turn_rows(side), lanes=lanes, heads=plan.shape.kv_heads, dim=dim,
        **stages_of(side), before=[] if back else signs, after=signs if back else [], spread=spread, **holes,
    )  # fmt: skip


def stages_of(side: SidePlan) -> dict[str, str | int]:
    """What `hadamard` takes beside rows."""
    return {"stages": side.hadamard.bit_length() - 1, "factor": literal(entry(side.hadamard))}


def with_signs(side: SidePlan, lane: str, row: str, index: str = "") -> list[str]:
    """Lines that give a row (or rows under `index`) the random signs of a rotation, if it has any."""
    if not drawn(side):
        return []
    dim, size = side.stride, side.hadamard
    at = f"{side.space}_encode_ptr + h.to(tl.int64) * {side.space}_stride + {lane} // {size} * {size * dim} + {lane}"
    mask = f", mask={lane} < {dim}, other=0.0" if padded(dim) > dim else ""
    return [
        f"first = tl.load({at}{mask})  # of each block the row that has the signs alone",
        f"{row} = tl.where(first{index} < 0.0, -{row}, {row})",
    ]


def planes_to_rotate(keys: Planes, query: str) -> list[str]:
    """Lines that load the rows of a query [lanes, rows] plane by plane, and signs."""
    side, words, lines = keys.side, keys.side.stride // WORD, []
    planes = range(side.layout.planes)
    if drawn(side):
        lines = [f"signs{i} = tl.load(keys_signs_ptr + h * {words}{plus(i)})" for i in range(words)]
    loads = [f"tl.load({query} + {keys.plane_lane(j)}[:, None], mask=live[None, :], other=0.0)" for j in planes]
    wide = ".to(tl.float32)" * (keys.plan.shape.dtype == "bf16")  # the interpreter does not calculate with bfloat16
    return lines + [f"raw{j} = {load}{wide}" for j, load in enumerate(loads)]


def rotated_planes(keys: Planes) -> list[str]:
    """Lines that rotate the rows of a query that were loaded plane by plane: those of a plane by a product of signs,
    and a block that is wider by sums of planes, too."""
    side, layout = keys.side, keys.side.layout
    planes, width, size, lines = range(layout.planes), layout.plane_width, side.hadamard, []
    for j in planes if drawn(side) else ():
        word, bit = divmod(j * width, WORD)
        lines.append(f"raw{j} = with_signs(raw{j}, signs{word}, {keys.lane}{plus(bit)})")
    lines += [f"x{j} = hadamard_lanes(raw{j}, {min(size, width)})" for j in planes]
    lines += [*planes_added("x", layout.planes, width, size), f"turned_scaling = scaling * {literal(entry(size))}"]
    return lines + [f"x{j} = x{j} * turned_scaling" for j in planes]


def planes_added(letter: str, planes: int, width: int, size: int) -> list[str]:
    """Lines that apply Sylvester's matrix of `size` rows to numbers <letter><plane> in so far as it is one of planes of
    `width` channels: sums and differences."""
    lines, apart = list[str](), 1
    while apart * width < size:
        pairs = ((f"{letter}{j}", f"{letter}{j + apart}") for j in range(planes) if not j & apart)
        lines += [f"{a}, {b} = {a} + {b}, {a} - {b}" for a, b in pairs]
        apart *= 2
    return lines


def _turn(plan: Plan, side: SidePlan, name: str, source: str, total: str, **holes: list[str] | str | int) -> str:
    """`total`: rows of a head in `source`."""
    if side.hadamard:
        return _rotate(plan, side, name, source=source, **holes)
    back = name.startswith("restore")
    taken, given = (side.stride, plan.shape.head_dim) if back else (plan.shape.head_dim, side.stride)
    which = f"{side.space}_{'decode' if back else 'encode'}"
    shift = []
    if side.shifted:
        shift = [
            f"shift = tl.load({which}_shift_ptr + h * {side.space}_shifts * {given} + i, mask=i < {given}, other=0.0)",
            "y = y + shift.to(tl.float64)[None, :]",
        ]
    lanes = min(TURN_LANES, padded(given))
    at, lines = "source + d", [f"source = {source} + row * {taken}"]
    if side.joined > 1:  # the vectors of all heads that are rotated together, one behind the other
        at = f"{source} + (row + d // {taken} * {total}) * {taken} + d % {taken}"
        lines = [f"row = row - h % {side.joined} * {total}"]
    return fill(
        TURN, name=name, rows=TURN_ROWS, lanes=lanes, heads=plan.shape.kv_heads, given=given,
        numbers=taken * side.joined, at=at, source=lines,
        matrix_ptr=f"{which}_columns_ptr", stride=f"{side.space}_stride", shift=shift, **holes,
    )  # fmt: skip


def map_arguments(side: SidePlan, what: str) -> list[str]:
    """The arguments of a kernel that applies `encode` or `decode` to rows: matrix, by columns, shift, and how far one
    head's is apart; of a rotation the matrix that has its signs, if it has any."""
    if side.hadamard:
        return [f"{side.space}_encode_ptr", f"{side.space}_stride"] if drawn(side) else []
    name = f"{side.space}_{what}"
    shift = [f"{name}_shift_ptr", f"{side.space}_shifts"] if side.shifted else []
    return [f"{name}_columns_ptr", f"{side.space}_stride", *shift]


def whole_map(side: SidePlan) -> tuple[str, str]:
    """What the map of a side's whole row is called, and how far one head's is apart: of one term its own."""
    name = side.space if side.residual is None else f"{side.space}_read"
    return f"{side.space}_{'decode' if side.residual is None else 'read'}_ptr", f"{name}_stride"


def rotated(side: SidePlan) -> bool:
    """Whether the map of a side's whole row is a Hadamard rotation."""
    return bool(side.hadamard) and len(side.terms) == 1


def whole_arguments(side: SidePlan) -> list[str]:
    """The arguments of a kernel that applies the map of a side's whole row."""
    if rotated(side):
        return map_arguments(side, "decode")
    shift = [f"{side.space}_decode_shift_ptr", f"{side.space}_shifts"] if side.shifted else []
    return [*whole_map(side), *shift]


def turn(plan: Plan, side: SidePlan) -> str:
    """The text of `turn_<side>`: tokens u in [low, low + count) of the rows as float32 numbers to be coded."""
    rows = "coded_ptr" if made(side) else "rows_ptr"
    args = [rows, "first_ptr", "begin_ptr", "end_ptr", *map_arguments(side, "encode"), "out_ptr"]
    args += ["total_rows", "offset", "ring", "low", "count"]
    args += ["squares_ptr"] if side.sketched else []
    where = [
        "u = low + n",
        "inside = (n < count) & (u >= tl.load(begin_ptr + b)) & (u < tl.load(end_ptr + b))",
        "row = (offset + tl.where(inside, u - tl.load(first_ptr + b), 0) % ring).to(tl.int64)",
        "row = bh.to(tl.int64) * total_rows + row",
    ]
    return _turn(
        plan, side, f"turn_{side.space}", args=", ".join(args), where=where,
        loose='"total_rows", "offset", "ring", "low", "count"',
        source=rows, total="total_rows", clean=["x = tl.where(x == x, finite(x), x)"], **_squares(side),
    )  # fmt: skip


def _squares(side: SidePlan) -> dict[str, list[str]]:
    """Lines that sum the squares of a vector, where they are what a scale is made of."""
    if not side.sketched:
        return {"squares": [], "squared": [], "stored": []}
    stored = [
        "if tl.program_id(2) == 0:",
        "    tl.store(squares_ptr + bh.to(tl.int64) * count + n, squares, mask=inside)",
    ]
    return {
        "squares": [f"squares = tl.zeros([{TURN_ROWS}], tl.float64)"],
        "squared": ["squares += x * x"],
        "stored": stored,
    }


def restore(plan: Plan, side: SidePlan) -> str:
    """The text of `restore_<side>`: decoded numbers (programs, count, M) float32 as the head's vectors."""
    args = ["coded_ptr", *map_arguments(side, "decode"), "out_ptr", "count"]
    where = ["inside = n < count", "row = bh.to(tl.int64) * count + n"]
    return _turn(
        plan, side, f"restore_{side.space}", args=", ".join(args), loose='"count"', where=where, source="coded_ptr",
        total="count", clean=[], squares=[], squared=[], stored=[],
    )  # fmt: skip


def query_tile(side: SidePlan) -> tuple[int, int]:
    """(query rows of a program of `turn_query`, numbers of its result)."""
    if side.rounded:
        return max(1, ROTATED // padded(side.row)), padded(side.row)
    return (turn_rows(side), padded(side.row)) if rotated(side) else (QUERY_ROWS, QUERY_LANES)


def turn_query(plan: Plan) -> str:
    """The text of `turn_query`: what multiplies a coded key in a score (B, Hq, Q, M), and what is added to it."""
    side, shape = plan.keys, plan.shape
    args = ["query_ptr", *whole_arguments(side), "turned_ptr"]
    if rotated(side):
        stages = stages_of(side)
        mapped = [*with_signs(side, "i", "x", "[None, :]"), f"y = hadamard(x, {stages['stages']}, {stages['factor']})"]
        return query_as_rows(plan, args, mapped, "y", [])
    bias = []
    if side.shifted:
        args.append("bias_ptr")
        bias = [
            f"shift = tl.load(keys_decode_shift_ptr + h * keys_shifts * {shape.head_dim} + d, mask=known, other=0.0)",
            "tl.store(bias_ptr + place, tl.sum(q * shift[None, :], 1), mask=live)",
        ]
    product = 'tl.dot(q, w, input_precision="ieee")' if shape.dtype == "fp32" else "times_map(q, w)"
    return fill(
        QUERY, args=_query_arguments(plan, args), **_query_holes(plan), padded=padded(shape.head_dim),
        taken=shape.head_dim, given=side.row, bias=bias, matrix_ptr=whole_map(side)[0], stride=whole_map(side)[1],
        gathered=_by_channel(plan, "d"), product=product,
    )  # fmt: skip


def query_as_rows(plan: Plan, args: list[str], mapped: list[str], stored: str, bias: list[str]) -> str:
    """The text of a `turn_query` whose programs have whole rows x: lines that map them, what is stored of each, and
    lines behind that."""
    return fill(
        QUERY_AS_ROWS, args=_query_arguments(plan, args), **_query_holes(plan), dim=plan.keys.row, mapped=mapped,
        stored=stored, bias=bias, kept=["q = x"] * gathers(plan), gathered=_by_channel(plan, "i"),
    )  # fmt: skip


def _query_arguments(plan: Plan, args: list[str]) -> str:
    return ", ".join([*args, *["gathered_ptr"] * gathers(plan), "batch", "queries", "soon"])


def _by_channel(plan: Plan, lane: str) -> list[str]:
    """Lines that store the query q [rows, lanes] itself by channels, see `host_slots.by_channel`: the programs of one
    part of the result do."""
    if not gathers(plan):
        return []
    at = f"gathered[:, None] + ({lane} * {stride(plan)})[None, :]"
    return [
        "if tl.program_id(1) == 0:",
        f"    bh = b * {plan.shape.kv_heads} + h",
        f"    {where_gathered(plan, rows='row_index')}",
        f"    tl.store({at}, q, mask=live[:, None] & ({lane} < {plan.shape.head_dim})[None, :])",
    ]


def _query_holes(plan: Plan) -> dict[str, str | int | list[str]]:
    """The size of a program, and lines that say which rows it has: of one kv head, whose map it reads, and of all
    sequences, as one query of a sequence would leave most of a product idle."""
    shape, (rows, lanes) = plan.shape, query_tile(plan.keys)
    whose = [
        "h = tl.program_id(2)",
        f"row = tl.program_id(0) * {rows} + tl.arange(0, {rows})",
        f"live = row < batch * queries * {shape.group}",
        f"b = row // (queries * {shape.group})",
        f"row_index = row % (queries * {shape.group})",
        f"head = b * {shape.q_heads} + h * {shape.group} + row_index % {shape.group}",
        f"place = head.to(tl.int64) * queries + row_index // {shape.group}",
    ]
    return {"rows": rows, "lanes": lanes, "whose": whose}
