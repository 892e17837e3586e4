"""How each generated Triton kernel is launched: argument types, warps, stages; for the runtime and ahead of time."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

from kvdsl.scheme import SIDES
from kvdsl.window import TILE

from .codec import searched, settled
from .launch import ATTEND, CONSTEXPR, Launch
from .occupancy import LEAST_LANES, MERGE_WARPS, MOST_EDGES, mapped_tile, merge_lanes, merge_warps
from .overlap import MERGES
from .plan import DECODE_ROWS, WIDEST, Plan
from .side import SidePlan
from .text import padded
from .tiling import NARROWEST
from .triton_append import packs
from .triton_turn import rotated
from .triton_vectors import word_halves

POINTERS = {
    "query_ptr": "input", "rows_ptr": "input", "source_ptr": "input", "key_rows_ptr": "input",
    "value_rows_ptr": "input", "fresh_keys_ptr": "input", "fresh_values_ptr": "input",
    "pool8_ptr": "*u8", "pool16_ptr": "*i16", "pool32_ptr": "*i32", "pool_fp16_ptr": "*fp16", "pool_fp32_ptr": "*fp32",
    "squares_ptr": "*fp64", "numbers_ptr": "*i16", "places_ptr": "*u8",
    "bytes_ptr": "*u8", "above_ptr": "*u8",
    "first_ptr": "*i32", "begin_ptr": "*i32", "end_ptr": "*i32", "table_ptr": "*i32", "packed_keys_ptr": "*i32",
    "packed_values_ptr": "*i32", "length_ptr": "*i32", "start_ptr": "*i32", "position_ptr": "*i32",
    "place_ptr": "*i32", "asked_ptr": "*i32", "due_keys_ptr": "*i32", "due_values_ptr": "*i32",
    "keys_signs_ptr": "*i32",
}  # fmt: skip
GIVEN = {"scale": "scale", "second": "scale.scale", "table": "code"}  # pointer -> name of the parameter behind its side
GIVEN_POINTERS = {f"{side}_{name}_ptr": f"{side}.{path}" for side in SIDES for name, path in GIVEN.items()}
POINTERS |= dict.fromkeys(GIVEN_POINTERS, "*fp32")
FLOATS = ("scaling", "softcap")
ENDS = ("merge", "unite")  # they store outputs
SCORE = ("scores", "reach", "received")
HALVED = 8192  # bytes of a tile, two tokens abreast, of which two warps each do half
FEW = 8  # partials of a row that is mapped with others: `wush2` 64 x 8 x 2048, of six, two warps 64.6 us, four 67.1
MANY = 512  # scales of a tile's keys, whose products wait beside sums of received attention

# Settings of NVIDIA's assembler, tried in this order until a kernel keeps its numbers in registers: just above a count
# that allows one program more it would rather move a few to memory, and where all are in use its schedule is what
# takes too many: without it the loop of such a kernel has as many instructions.
ASSEMBLER = (None, "--register-usage-level=10", "--register-usage-level=0", "maxnreg=255", "--opt-level=1")


def warps(kernel: str, plan: Plan) -> int:
    """Warps of a program: one where tiles stay in one warp's tensor cores or numbers are exchanged within it, two
    where 16 rows, sums of many numbers, tiles most of whose lanes are idle, codes of vectors in narrow planes, two
    sketches, one of many rows, codes of three streams in groups on both sides, or of 4 bits beside vectors of low rank
    on both sides, values that are sums of codes, single numbers and vectors of low rank, or received attention beside
    many scales or of two sketches would not fit its registers, four or more where a page is rewritten, products are of
    float32 numbers, keys are rotated (two where pairs of planes are, by levels of the parameters, or channels in an
    order), entries of tables are added up, or radii and angles become channels level by level.  Always a power of two,
    which Triton asks for."""
    return 1 << _wanted(kernel, plan).bit_length() - 1


def divisible(plan: Plan) -> bool:
    """Whether two warps of decode each do half of what one does: of a whole tile, and of two tokens abreast of enough
    codes that a product of each is less than what both do at the edges (`kvtq_2bit` 1 x 8 x 1024 9.0 us, with two warps
    10.3, `exl3_3` 12.9, 14.2).  Smaller ones take as long."""
    enough = not plan.of_decode.abreast or loop_bytes(plan) >= HALVED
    return warps("decode", plan) == 1 and plan.tile >= TILE and enough


def decode_warps(plan: Plan) -> tuple[int, ...]:
    """Warps that a program of decode may have, the usual ones first."""
    usual = warps("decode", plan)
    return (usual, 2 * usual) if divisible(plan) else (usual,)


def _wanted(kernel: str, plan: Plan) -> int:
    """Warps by what a program does; of heads of 96 or 192 channels they come out as three or six."""
    exact = plan.shape.dtype == "fp32" or any(term.floats == "fp32" for term in plan.terms)
    if kernel == "append":
        # Both sides' blocks, in loops around them, and few programs: twice the warps that pack either.
        packed = [2 * warps(f"pack_{term.label}", plan) for side in SIDES for term in packs(plan.side(side))]
        return min(8, max(4, *packed)) if packed else 1
    if kernel.startswith("pack"):
        return _pack_warps(plan.side(kernel.removeprefix("pack_")))
    if kernel.startswith("unpack"):
        return max(4, min(16, plan.tile * plan.side(kernel.removeprefix("unpack_")).dim // 2048))
    if kernel == "turn_query" and (rotated(plan.keys) or plan.queries is not None):
        return 1
    if kernel.startswith(("turn_k", "turn_v", "restore")):
        return 1 if plan.side(kernel.partition("_")[2]).hadamard else 8
    if kernel in ("unrope_keys", "rope_keys"):
        return 4
    if kernel in MERGES:
        return 1  # times those of its tile
    if kernel not in (*ATTEND, *SCORE) or exact:
        return 4
    if kernel == "reach" and plan.keys.rope is not None and plan.keys.sparse:
        return 8  # a running maximum beside single numbers at their positions
    if kernel != "received" and all(t.alphabet.vectors and t.layout.plane_width < NARROWEST for t in plan.terms):
        return 2  # half of an operand's lanes are idle: what two more warps would do is the same again
    if plan.in_pairs and (plan.keys.alphabet.given or plan.keys.ordered):
        # a row of waves of every plane, and scales of every channel, stay in registers
        narrow = plan.keys.layout.plane_width < 2 * NARROWEST
        if not narrow or kernel in ATTEND and not plan.keys.sparse:
            return 2
    if plan.keys.rope is not None or any(term.band or term.alphabet.sums for term in plan.terms):
        return 4  # decoded numbers, waves and two queries a plane: one warp moves hundreds of them to memory
    if plan.values.sparse and any(term.factors for term in plan.values.terms):
        return 4 if plan.shape.head_dim > WIDEST // 2 else 2  # `gear2` 16 x 8 x 16384: four 659 us, two 445
    narrow = any(term.store.pick and 2 * term.layout.plane_width <= NARROWEST for term in plan.terms)
    narrow = narrow or kernel == "received" and plan.keys.groups * plan.tile >= MANY
    beside = all(any(term.factors for term in side.terms) for side in (plan.keys, plan.values))
    narrow = narrow or plan.keys.masked and (plan.keys.row > WIDEST or kernel == "received")
    narrow = narrow or all(side.groups > 1 and len(side.layout.streams) > 2 for side in (plan.keys, plan.values))
    # scales of every channel stay in registers beside two streams of codes on both sides
    streams = min(len(side.layout.streams) for side in (plan.keys, plan.values))
    narrow = narrow or kernel in ATTEND and plan.keys.static and streams > 1
    wide = plan.values.row > WIDEST or narrow or beside and any(term.alphabet.bits >= 4 for term in plan.terms)
    return 1 if plan.columns(many=kernel != "decode") == DECODE_ROWS and not wide else 2


def _pack_warps(side: SidePlan) -> int:
    """Few where little is done with each number, so that what every lane does once is done for many; where channels are
    measured over tokens all lanes that share one repeat it.  A table of the parameters is in registers, and so are the
    middles between its levels."""
    meta = side.layout.meta
    plain = settled(side) and not (searched(side) or side.scale.refit or side.alphabet.kind == "table")
    # numbers a program keeps at a time: planes whose channels have scales of their own come singly
    singly = side.store.measure is not None and side.store.measure.block.channels == 1
    held = side.span * (side.layout.plane_width if singly else side.dim)
    if side.alphabet.given or meta is None or not plain:
        return 8 if side.alphabet.given else max(4, min(8, held // 1024))
    alone = meta.tokens > 1 and meta.channels == 1
    return min(8, max(1, side.span * side.dim // 4096) if alone else max(2, held // 2048))


def fused(kernel: str) -> bool:
    """Whether the compiler may fuse a product and a sum: not where a number is stored or given back."""
    return not kernel.startswith(("pack", "append", "unpack", "turn", "restore", "unrope", "rope"))


def merge_tile(
    plan: Plan, names: Sequence[str], partials: int, edges: int, rows: int | None = None, processors: int = 1
) -> tuple[dict[str, int], int]:
    """(What a program of a merge with arguments of these names has, its warps), of so many partials, of which `edges`
    have exact numbers apart.  `rows` None: not known, as of a fixed plan, whose sums must not depend on the batch."""
    values, channels = plan.values, padded(plan.values.channels)
    if "MERGED" in names:
        lanes = min(LEAST_LANES, channels)
        merged, step = mapped_tile(0 if rows is None else rows * channels // lanes, partials, values.row, processors)
        return {"LANES": lanes, "MERGED": merged, "STEP": step}, 2 if merged > 1 and partials <= FEW else MERGE_WARPS
    together = partials + (edges if "EDGES" in names else 0)
    least = max(LEAST_LANES, values.layout.plane_width if plan.adds_planes else 0)
    lanes = merge_lanes(rows, together, channels, processors, least) if "LANES" in names else channels
    return {"LANES": lanes}, merge_warps(together * lanes)


def stages(kernel: str, plan: Plan) -> tuple[int, ...]:
    """Depths of the asynchronous pipeline, the best first: every loaded tile waits in shared memory, which is small on
    some GPUs, the waves of positions with it, which take several times what the codes do."""
    if kernel not in ATTEND:
        return (1,)
    if plan.keys.masked:  # rows of a map, of channels that a page names: of three tiles a processor has few programs
        return (2, 1, 3)
    # so do what single numbers gather: `gear4` 16 x 8 x 16384 421 us, three tiles deep 717, `gear2` 446 and 440
    gathered = any(side.slots is not None for side in plan.stored)
    return (2, 3, 1) if gathered or plan.keys.rope is not None else (3, 2, 1)


def loop_bytes(plan: Plan, *, repeated: bool = False) -> int:
    """Packed bytes, metadata included, that one tile of the main loop reads of one head.

    `repeated`: also of the heads that are rotated together with it.  Their programs read them as well, so that memory
    brings them once, and a cache again.
    """
    layout, total = plan.layout, 0
    for side in plan.stored:
        size = sum(stream.size for stream in side.layout.streams)
        if side.floats:
            size += layout.page_tokens * side.dim * (4 if side.floats == "fp32" else 2)
        if (held := side.factors) is not None:
            size += 2 * held.rank * (layout.page_tokens + held.blocks * side.dim)
        if (slots := side.slots) is not None:
            size += 3 * slots.entries
        if (beside := side.beside) is not None:
            size += beside.size(layout.page_tokens)
        if side.layout.across:
            size += 2 * side.layout.across.entries
        if side.chosen:
            size += side.chosen.count * side.chosen.blocks
        if side.layout.meta is not None:
            meta = side.layout.meta
            size += meta.size // (meta.head_groups if meta.shared else 1)
        total += size * (side.joined if repeated else 1)
    return total * plan.tile // layout.page_tokens


@cache
def arguments(source: str) -> dict[str, tuple[str, ...]]:
    """The argument names of every kernel of a generated text, whose functions are all written alike."""
    called = set(re.findall(r"(?<!def )\b(\w+)\(", source))
    found = {
        name: tuple(re.findall(r"(\w+)(?:: [\w.]+)?(?:,|$)", given.strip()))
        for name, given in re.findall(r"^def (\w+)\(([^)]*)\):", source, re.MULTILINE)
        if name not in called
    }
    return {name: names for name, names in found.items() if any(one.endswith("_ptr") for one in names)}


def _type(name: str, kernel: str, plan: Plan) -> str:
    if name.isupper():
        return CONSTEXPR
    if name in FLOATS:
        return "fp32"
    if name == "out_ptr":
        return {"fp16": "*fp16", "bf16": "*i16", "fp32": "*fp32"}[plan.shape.dtype] if kernel in ENDS else "*fp32"
    if name == "keys_order_ptr":
        return "*i32"
    if name == "keys_inner_ptr":
        return "*fp32" if plan.exact_keys else "*fp16"
    if name.endswith("_rows_ptr") and name.startswith("keys_"):  # a sketch's map, ready for codes
        return "*fp16"
    if name.endswith("_table_ptr") and plan.side(name.removesuffix("_table_ptr")).alphabet.sums:
        return "*fp16"
    if name.endswith("_table_ptr") and plan.side(name.removesuffix("_table_ptr")).alphabet.vectors:
        return f"*i{16 * word_halves(plan.side(name.removesuffix('_table_ptr')))}"
    if name.endswith("_columns_ptr"):  # a map, of rows
        return "*fp64"
    if name.endswith("_ptr"):
        kind = POINTERS.get(name, "*fp32")
        return f"*{plan.shape.dtype}" if kind == "input" else kind
    return "i32"


def launches(plan: Plan, source: str) -> tuple[Launch, ...]:
    """One launch record a kernel, as it runs on a GPU."""
    records = []
    for kernel, names in arguments(source).items():
        rows, splits = plan.rows(many=False), 16
        tile, times = merge_tile(plan, names, splits, MOST_EDGES) if "SPLITS" in names else ({}, 1)
        constants = tile | {
            "ROWS": rows, "TO_ROWS": rows, "SPLITS": splits, "EDGES": MOST_EDGES, "EARLY": False,
            "PAIRS": plan.shape.head_dim // 2,  # of models whose rotary positions turn all channels
        }  # fmt: skip
        records.append(
            Launch(
                kernel,
                tuple((name, _type(name, kernel, plan)) for name in names),
                tuple((name, constants[name]) for name in names if name in constants),
                warps=warps(kernel, plan) * times,
                stages=stages(kernel, plan),
                assembler=ASSEMBLER,
                fp_fusion=fused(kernel),
                loop_packed_bytes=loop_bytes(plan) if kernel in ATTEND else 0,
                aligned=tuple(name for name in names if name.endswith("_ptr")),
            )
        )
    return tuple(records)
