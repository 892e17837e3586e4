"""Driving a KernelSet by hand: pages in a shuffled pool, exact rows in a ring that wraps, poison wherever nothing is.

A kernel that reads what it must not meets NaN in floats and `POISON` in packed words, and its result shows it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvdsl.kernels import AttentionState, KernelSet, Params, Side
from kvdsl.params import checked
from kvdsl.scheme import SIDES
from kvdsl.window import windows

POISON = 0x5A
Ends = Mapping[Side, Sequence[int]]


@dataclass(frozen=True)
class Poison:
    """What fills the places that no kernel may read: a byte of the pool, a float of the rows, how much room is left
    over, and how pages and rings are shuffled."""

    word: int = POISON
    number: float = math.nan
    spare: int = 3
    seed: int = 0


USUAL = Poison()


@dataclass(frozen=True)
class Pages:
    """Packed tokens of B sequences: pool uint8 (pages, page_bytes), table int32 (B, width)."""

    pool: Tensor
    table: Tensor

    def content(self) -> Tensor:
        """The pages of each sequence in order: uint8 (B, pages, page_bytes), without the table's padding."""
        return self.pool[self.table[:, :-1].long()].cpu()


def device_of(kernels: KernelSet) -> torch.device:
    """Where the kernels run here."""
    return torch.device("cuda" if kernels.backend == "triton" and torch.cuda.is_available() else "cpu")


def integers(values: Sequence[int], device: torch.device) -> Tensor:
    """int32 (B,) on the device."""
    return torch.tensor(list(values), dtype=torch.int32, device=device)


def ready(kernels: KernelSet, params: Params | None) -> dict[str, Tensor]:
    """Parameters as the kernels take them: on their device, with the maps made of them."""
    return checked(kernels.scheme, kernels.shape, params, device_of(kernels))


def new_pages(kernels: KernelSet, batch: int, tokens: int, poison: Poison = USUAL) -> Pages:
    """Poisoned pages for `tokens` tokens after the sinks of each sequence, in a random order."""
    device = device_of(kernels)
    width = max(1, -(-tokens // kernels.page_tokens))
    pool = torch.full((batch * width + 1, kernels.page_bytes), poison.word, dtype=torch.uint8, device=device)
    order = torch.randperm(batch * width + 1, generator=torch.Generator().manual_seed(poison.seed))
    table = torch.cat([order[:-1].view(batch, width), order[-1:].expand(batch, 1)], 1)
    return Pages(pool, table.to(device, torch.int32).contiguous())


def ring_rows(
    x: Tensor, lengths: Sequence[int], sinks: int, kept: Sequence[int], first: Sequence[int], ring: int, poison: Poison
) -> Tensor:
    """Exact rows (B, H, sinks + ring, D) of x (B, H, T, D): the sinks, and tokens u >= kept_b; the rest is poison."""
    rows = torch.full((*x.shape[:2], sinks + ring, x.shape[3]), poison.number, dtype=x.dtype)
    for b, length in enumerate(lengths):
        rows[b, :, : min(sinks, length)] = x[b, :, : min(sinks, length)]
        u = torch.arange(kept[b], max(kept[b], length - sinks))
        assert len(u) <= ring, "the ring is too short for the exact rows"
        rows[b, :, sinks + (u - first[b]) % ring] = x[b, :, sinks + u]
    return rows


def pack(
    kernels: KernelSet, side: Side, x: Tensor, begin: Sequence[int], end: Sequence[int], pages: Pages,
    params: Params | None = None, poison: Poison = USUAL,
) -> None:  # fmt: skip
    """Pack tokens u in [begin_b, end_b) of x (B, H, T, D), whose token u = 0 stands at t = sinks."""
    sinks = windows(kernels.scheme)[side].sinks
    device = device_of(kernels)
    ring = max(1, max(e - b for b, e in zip(begin, end, strict=True))) + poison.spare
    first = [b - 2 * (poison.seed % 3) for b in begin]
    ends = [sinks + e if e else min(sinks, x.shape[2]) for e in end]
    rows = ring_rows(x, ends, sinks, begin, first, ring, poison).to(device)
    reach = (min(begin), max(end))
    kernels.pack(
        side, rows, integers(first, device), sinks, integers(begin, device), integers(end, device), reach, pages.pool,
        pages.table, ready(kernels, params),
    )  # fmt: skip


def packed(
    kernels: KernelSet, k: Tensor, v: Tensor, ends: Ends, params: Params | None = None,
    poison: Poison = USUAL, room: int = 0,
) -> Pages:  # fmt: skip
    """Pages that hold tokens u in [0, ends[side]_b) of k and v."""
    most = max(room, *(max(ends[side]) for side in SIDES))
    pages = new_pages(kernels, k.shape[0], most, poison)
    for side, x in zip(SIDES, (k, v), strict=True):
        pack(kernels, side, x, [0] * k.shape[0], ends[side], pages, params, poison)
    return pages


def attention_state(
    kernels: KernelSet, k: Tensor, v: Tensor, lengths: Sequence[int], seen: Sequence[int], *,
    params: Params | None = None, start: Sequence[int] | None = None, window: int | None = None,
    softcap: float | None = None, scaling: float | None = None, poison: Poison = USUAL,
) -> AttentionState:  # fmt: skip
    """What a step reads: sequence b has lengths_b tokens of k and v (B, H, T, D), packed as they were after seen_b."""
    policies = windows(kernels.scheme)
    device, batch, sinks = device_of(kernels), k.shape[0], policies["keys"].sinks
    ends = {side: [policies[side].packed(n) for n in seen] for side in SIDES}
    pages = packed(kernels, k, v, ends, params, poison, room=max(lengths) - sinks)
    kept = [min(pair) for pair in zip(ends["keys"], ends["values"], strict=True)]
    ring = max(1, *(n - sinks - low for n, low in zip(lengths, kept, strict=True))) + poison.spare
    first = [low - poison.seed % 5 for low in kept]
    rows = {
        side: ring_rows(x, lengths, sinks, ends[side], first, ring, poison).to(device)
        for side, x in zip(SIDES, (k, v), strict=True)
    }
    return AttentionState(
        pages.pool, pages.table, integers(ends["keys"], device), integers(ends["values"], device),
        integers(lengths, device), rows["keys"], rows["values"], integers(first, device),
        integers(start or [0] * batch, device), max(lengths), max(ends["keys"] + ends["values"]),
        k.shape[3] ** -0.5 if scaling is None else scaling, softcap, window,
    )  # fmt: skip
