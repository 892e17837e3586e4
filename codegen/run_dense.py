"""Attention of many query rows: packed tokens are decoded once, chunk by chunk, and all rows attend to what they are.

What is decoded has the type that the products of the other kernels are of: float16, or float32 where theirs are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from kvdsl.errors import BackendError

from .chunks import decoded_chunks
from .device_dense import attend_dense
from .plan import WIDEST, Plan
from .run_parts import LOG2E, NO_WINDOW, Part, Scratch
from .run_queries import among_decoded
from .text import padded

LEAST = 256  # tokens that a program has at least, to be worth its partial
WARPS = 8
WIDE = 128  # channels up to which a program may have 128 rows


def dense_type(plan: Plan) -> torch.dtype:
    """Of decoded numbers."""
    return torch.float32 if plan.exact_numbers else torch.float16


def tiles(plan: Plan, rows: int) -> dict[str, int]:
    """Constants of the kernel for so many rows of a kv head, as registers allow: rows of a program, tokens of a tile,
    and the depth of the pipeline where shared memory has room for it."""
    if dense_type(plan) == torch.float32 or plan.shape.head_dim > WIDEST:  # no tensor cores, or few registers
        return {"ROWS": 16, "TOKENS": 16, "STAGES": 1}
    if padded(plan.shape.head_dim) > WIDE:
        return {"ROWS": 64, "TOKENS": 32, "STAGES": 2}
    return {"ROWS": 64 if rows <= 64 else 128, "TOKENS": 64, "STAGES": 3}


def programs(part: Part) -> int:
    """Programs that a sequence's tokens are not shared among."""
    rows = part.query.shape[2] * part.plan.shape.group
    return part.programs * -(-rows // tiles(part.plan, rows)["ROWS"])


def attend(part: Part, into: Scratch, lines: int) -> None:
    """Write `part.clean` partials of every row; `lines` rows of a kv head have places."""
    plan, state, query = part.plan, part.state, part.query.contiguous()
    shape, places, capped = plan.shape, state.places, state.softcap is not None
    batch, _, queries, dim = query.shape
    sizes = tiles(plan, queries * shape.group)
    given: dict[str, Any] = {
        "query_ptr": query, **_met(part),
        "packed_keys_ptr": state.packed_keys, "packed_values_ptr": state.packed_values,
        "length_ptr": state.length, "start_ptr": state.start, "first_ptr": state.first,
        "key_rows_ptr": state.key_rows, "value_rows_ptr": state.value_rows,
        "place_ptr": None if places is None else places.at, "asked_ptr": None if places is None else places.asked,
        "partial_ptr": into["partial_ptr"], "lse_ptr": into["lse_ptr"], "queries": queries,
        "ring": state.key_rows.shape[2] - plan.sinks, "window": NO_WINDOW if state.window is None else state.window,
        "ahead": state.ahead, "room": 0 if places is None else places.at.shape[2],
        "origin": 0 if places is None else places.origin, "splits": part.clean, "lines": lines,
        "scaling": state.scaling * (1.0 if capped else LOG2E), "softcap": state.softcap if capped else 1.0,
        "HEADS": shape.kv_heads, "GROUP": shape.group, "DIM": dim, "LANES": padded(dim),
        "VALUE_DIM": plan.values.channels, "VALUE_LANES": padded(plan.values.channels), "SINKS": plan.sinks,
        "CAPPED": capped, "PLACED": places is not None,
    }  # fmt: skip
    grid = (part.programs, part.clean, programs(part) // max(1, part.programs))
    if 0 in grid:
        return
    for low, high in decoded_chunks(plan, state, 2 * batch * shape.kv_heads * dim * dense_type(plan).itemsize):
        keys, values = decoded(part, low, min(high, state.packed_most))
        given |= {"keys_ptr": keys, "values_ptr": values, "low": low, "high": high, "held": keys.shape[2]}
        _launch(grid, given | sizes | {"GOES_ON": low > 0})


def _met(part: Part) -> dict[str, Any]:
    """What decoded keys meet where queries are rounded, and what is added to that."""
    plan, shape = part.plan, part.plan.shape
    given: dict[str, Any] = {"met_ptr": None, "more_ptr": None, "ROUNDED": False, "SHIFTED": False}
    if plan.queries is None:
        return given
    query = part.query.contiguous()
    turned = part.module.turned(query, part.params)["turned_ptr"]
    rows, met = (x.to(torch.float32).unflatten(1, (shape.kv_heads, -1)).flatten(2, 3) for x in (query, turned))
    near, more = among_decoded(plan, rows, met, part.params)
    given |= {"met_ptr": near.reshape(query.shape).contiguous(), "ROUNDED": True, "SHIFTED": more is not None}
    return given | {"more_ptr": None if more is None else more.reshape(query.shape[:3]).contiguous()}


def _launch(grid: tuple[int, int, int], given: dict[str, Any]) -> None:
    """Run the kernel, with less of a pipeline where the GPU has less shared memory."""
    for depth in range(given["STAGES"], 0, -1):
        try:
            attend_dense[grid](**(given | {"STAGES": depth}), num_warps=WARPS)
            return
        except OutOfResources as error:
            refused = error
    raise BackendError(f"attend_dense does not fit this GPU: {refused}")


def decoded(part: Part, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Keys and values of packed tokens u in [low, high), (B, H, high - low, D)."""
    state = part.state
    keys, values = (
        part.module.unpack(side, state.pool, state.table, low, high, part.params, state.places, dense_type(part.plan))
        for side in ("keys", "values")
    )
    return keys, values
