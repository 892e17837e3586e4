"""One sequence of a batch, as if it were alone: torch sums a product of matrices in an order that depends on its sizes,
so that what a sequence gets to the bit must be computed from its own tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from kvdsl.kernels import AttentionState, Fold, Places, Segments

Run = Callable[[Tensor, Segments], tuple[Tensor, Tensor]]


def one_by_one(run: Run, query: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """What `run` gives for each sequence alone, put together.  Lengths are asked of the device."""
    found = []
    for b in range(query.shape[0]):
        own = [(module, _state(state, b), params, _fold(fold, b)) for module, state, params, fold in segments]
        found.append(run(query[b : b + 1], own))
    out, lse = (torch.cat(each) for each in zip(*found, strict=True))
    return out, lse


def _state(state: AttentionState, b: int) -> AttentionState:
    """Sequence b of a state."""
    one = slice(b, b + 1)
    packed = max(int(state.packed_keys[b]), int(state.packed_values[b]))
    return replace(
        state, table=state.table[one], packed_keys=state.packed_keys[one], packed_values=state.packed_values[one],
        length=state.length[one], key_rows=state.key_rows[one], value_rows=state.value_rows[one],
        first=state.first[one], start=state.start[one], longest=int(state.length[b]), packed_most=packed,
        places=_places(state.places, b),
    )  # fmt: skip


def _places(places: Places | None, b: int) -> Places | None:
    if places is None:
        return None
    return places._replace(at=places.at[b : b + 1], asked=None if places.asked is None else places.asked[b : b + 1])


def _fold(fold: Fold | None, b: int) -> Fold | None:
    return None if fold is None else Fold(*(None if x is None else x[b : b + 1] for x in fold))  # type: ignore[arg-type]
