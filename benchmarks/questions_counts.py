"""What docs/questions.md counts without a model: bits, the random matrix, machine code, errors at head_dim 128."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

from questions_members import (
    APART,
    CHANNEL,
    EVEN,
    EXACT,
    FAST,
    FITTED,
    GAUSSIAN,
    NORMAL,
    ORTHOGONAL,
    QUAROT,
    RULES,
    SEEDS,
    TOKEN,
    key_store,
    keys,
    kivi_at,
)  # fmt: skip

from kvdsl.codegen.roofline import LINE
from kvdsl.codegen.static import Figures, figures
from kvdsl.codegen.triton_turn import ROTATED, TURN_LANES, TURN_ROWS
from kvdsl.cost import bits
from kvdsl.evaluation.run import versions
from kvdsl.scheme import Scheme, Store, per_token
from kvdsl.shape import Shape
from kvdsl.spaces import maps
from kvdsl.study import studied

ROOT = Path(__file__).resolve().parent.parent
SHAPE = Shape(128, 8, 32)
LENGTHS = (None, 1024, 4096, 32768)
HEADS = (64, 128)
WINDOW = 128
UNROLLED = 4  # numbers of a vector that an iteration of the kernel with a dense map takes
Say = Callable[[str], None]


def short(number: float) -> float:
    return float(f"{number:.6g}")


def of_bits(say: Say) -> dict[str, Any]:
    """KIVI's, a sketch's and ternary digits' bits, as `kvdsl.bits` counts them."""
    kivi = [
        {
            "bits": width,
            "group": group,
            "head_dim": head_dim,
            "tokens": tokens,
            **_around(width, group, head_dim, tokens),
        }
        for width in (2, 4)
        for group in (32, 64, 128)
        for head_dim in HEADS
        for tokens in LENGTHS
    ]
    sketches = [
        {
            "family": family, "rows": rows, "head_dim": head_dim, "code": side.code, "metadata": side.metadata,
            "padding": side.padding, "constants": found.constants,
        }
        for family, most in ((ORTHOGONAL, 8), (APART, 4))
        for rows in range(1, most + 1)
        for head_dim in HEADS
        for found in [bits(keys(key_store(family, rows, 0, head_dim)), head_dim, 8)]
        for side in [found.side("keys")]
    ]  # fmt: skip
    code, options = RULES[FITTED]
    digits = [
        {"head_dim": head_dim, "code": found.code, "metadata": found.metadata, "padding": found.padding}
        for head_dim in (64, 80, 96, 128, 256)
        for found in [bits(Scheme(both=Store(code, scale=per_token(**options))), head_dim, 8)]
    ]
    return {"kivi": kivi, "sketches": sketches, "digits": digits}


def _around(width: int, group: int, head_dim: int, tokens: int | None) -> dict[str, float]:
    """KIVI's parts at a length: the mean over a window of lengths around it, since keys leave 128 at a time."""
    scheme, half = kivi_at(width, group, head_dim), WINDOW // 2
    lengths = [None] if tokens is None else [tokens + more for more in range(-half, half)]
    found = [bits(scheme, head_dim, SHAPE.kv_heads, length) for length in lengths]
    return {
        part: short(fmean(getattr(one, part) for one in found)) for part in ("code", "metadata", "padding", "window")
    }


def of_matrices(say: Say) -> dict[str, Any]:
    """Bytes of the matrices that a sketch of keys has in memory: one pair for all layers, heads and sequences."""
    found = [
        {"rows": rows, "head_dim": head_dim, "bytes": sum(each.numel() * each.element_size() for each in made.values())}
        for rows in (1, 2, 4, 8)
        for head_dim in HEADS
        for made in [maps(key_store(ORTHOGONAL, rows, 0, head_dim), "keys", 1, head_dim, {}, "cpu")]
    ]
    return {"matrices": found}


COMPILED = {
    ORTHOGONAL: (1, 2, 4, 8), FAST: (2,), EVEN: (2, 4, 8), TOKEN: (2, 4, 8), CHANNEL: (2, 4, 8),
}  # fmt: skip
KERNELS = ("turn_keys", "pack_keys", "turn_query", "decode")


def of_code(say: Say) -> dict[str, Any]:
    """Machine code of the kernels that encode keys and read them, values being float16 numbers."""
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or ROOT / "build" / "aot")
    rows, triton = [], ""
    for family, steps in COMPILED.items():
        for width in steps:
            say(f"machine code of {family}, {width} bits")
            scheme = keys(key_store(family, width, 0, SHAPE.head_dim))
            counted = bits(scheme, SHAPE.head_dim, SHAPE.kv_heads).keys
            found = figures({"one": scheme}, SHAPE, ("sm_90",), kernels=KERNELS, cache_folder=folder, workers=1)
            rows.append({"family": family, "bits": width, **_row(found["one"], width, counted)})
            triton = found["one"][0].kernel.triton
    say("machine code of float16 numbers")
    found = figures({"one": Scheme(both=EXACT)}, SHAPE, ("sm_90",), cache_folder=folder, workers=1)
    rows.append({"family": "float16", "bits": 16, **_row(found["one"], 16, 16)})
    return {"rows": rows, "triton": triton, "shape": [SHAPE.head_dim, SHAPE.kv_heads, SHAPE.q_heads]}


def _row(found: list[Figures], width: int, key_bits: float) -> dict[str, Any]:
    """Lane instructions: of encoding, for a number of a key; of decode's loop, for a token of a head, key and value."""
    by_name = {one.kernel.kernel: one for one in found}
    made = {}
    if (pack := by_name.get("pack_keys")) is not None:
        each = pack.instructions_per_element
        # a sketch has `width` codes for a number of the key
        coded = 1 if pack.packing is None else pack.packing.elements / (pack.packing.tokens * SHAPE.head_dim)
        made["pack"] = None if each is None else short(each * coded)
    if (turn := by_name.get("turn_keys")) is not None:
        made["turn"] = short(_turned(turn, width))
    decode = by_name["decode"].kernel
    assert decode.predicted_share is not None
    size = (key_bits + 16) * SHAPE.head_dim / 8  # bytes of a token and head, values in float16
    return {
        **made, "loop": short(decode.slots * 32 / LINE * size), "products": short(decode.mma / LINE * size),
        "share": short(decode.predicted_share), "registers": decode.registers, "spills": decode.spills,
    }  # fmt: skip


def _turned(one: Figures, width: int) -> float:
    """Instructions of all lanes, for each number of a key, of the kernel that maps keys before they are packed."""
    kernel = one.kernel
    lanes = kernel.warps * 32
    if kernel.straight_instructions:  # a rotation by sums has no loop
        return kernel.straight_instructions * lanes / ROTATED
    behind = kernel.instructions - kernel.loop_instructions
    through = behind + kernel.loop_instructions * SHAPE.head_dim / UNROLLED
    return through * lanes / (TURN_ROWS * TURN_LANES) * width


def of_numbers(say: Say) -> dict[str, Any]:
    """What `kvdsl study` measures, at head_dim 128 on keys with outlier channels, over seeds."""
    plan = {
        GAUSSIAN: range(1, 9), ORTHOGONAL: range(1, 9), APART: range(1, 5), EVEN: range(2, 9), NORMAL: range(1, 5),
        QUAROT: range(1, 9), TOKEN: range(2, 9), CHANNEL: range(1, 9),
    }  # fmt: skip
    return {"rows": list(_numbers(plan, say)), "seeds": len(SEEDS), "versions": versions()}


def _numbers(plan: dict[str, range], say: Say) -> Iterator[dict[str, Any]]:
    for family, steps in plan.items():
        for width in steps:
            scheme = keys(key_store(family, width, 0, SHAPE.head_dim))
            found = studied(scheme, seeds=len(SEEDS))
            say(f"study of {family}, {width} bits: {found['score_error']}")
            counted = bits(scheme, SHAPE.head_dim, SHAPE.kv_heads).keys
            error = found["score_error"]
            spread = {"mean": short(error["mean"]), "std": short(error["std"])}
            yield {"family": family, "bits": width, "key_bits": counted, "score_error": spread}


COUNTS: dict[str, Callable[[Say], dict[str, Any]]] = {
    "bits": of_bits, "matrices": of_matrices, "code": of_code, "numbers": of_numbers,
}  # fmt: skip
