"""One step of an engine, cut into pieces that kernels read alike: made once a step, used by every layer.

The tokens of all requests stand one behind the other.  A piece is tokens of one request in one block; pieces of as many
queries as others make a group, which is one call of kernels over a batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .served import Served
from .slots import Slots


@dataclass(frozen=True)
class Requests:
    """What an engine says of a step, on the host.

    lengths   tokens of each request, those of this step included
    starts    where each request's tokens of this step begin among all, and at last their end
    table     int (requests, width): the engine's block of each block of tokens
    names     what requests are known by from step to step, each below the count of slots; None: by their blocks
    """

    lengths: np.ndarray
    starts: np.ndarray
    table: np.ndarray
    names: np.ndarray | None = None


@dataclass(frozen=True)
class Group:
    """Pieces of at most Q queries, n of them; index tensors are int64 on the device, but for what kernels read.

    queries     Q
    rows        (n, Q) where each query stands among the step's tokens; those of a shorter piece are its last ones, and
                before them stands its first one again
    inverse     of all real queries, where they stand in (n, Q) flattened; `outputs` where they go among the tokens
    table       int32 (n, width) pages
    length, packed   int32 (n,): tokens of the sequence with the piece's own; u below this is read from pages
    begin       int32 (n,): the u of the piece's first token
    longest, most    host: the largest length and packed
    held, fresh, new   of exact rows (n, sinks + block): the row among a slot's, the token among the step's, and which
                of the two it is; None where nothing waits
    slots       (n,) the slot of each piece's request; None where nothing waits
    full        (m,) the pieces that fill their blocks, and `full_table` int32 (m, pages + 1) where these go
    """

    queries: int
    rows: Tensor
    inverse: Tensor
    outputs: Tensor
    table: Tensor
    length: Tensor
    packed: Tensor
    begin: Tensor
    longest: int
    most: int
    held: Tensor | None = None
    fresh: Tensor | None = None
    new: Tensor | None = None
    slots: Tensor | None = None
    full: Tensor | None = None
    full_table: Tensor | None = None


@dataclass(frozen=True)
class Step:
    """The groups of a step, and where its tokens go among the exact rows: (slot, row, token) of each that stays."""

    groups: tuple[Group, ...]
    kept: tuple[Tensor, Tensor, Tensor] | None

    @classmethod
    def of(
        cls, requests: Requests, how: Served, slots: Slots | None, ring: int, device: torch.device, draft: int = 0
    ) -> Step:
        """`ring`: rows of a slot beside the sinks, `draft` more than a block: so many of the newest tokens may turn out
        never to have been."""
        owners = _slots_of(requests, how, slots, draft) if how.waits else None
        pieces = _cut(requests, how)
        sizes = pieces[:, 3] - pieces[:, 2]
        groups = tuple(
            _group(pieces[chosen], int(sizes[chosen].max()), requests, how, owners, ring, device)
            for chosen in _alike(sizes, how)
        )
        return cls(groups, _kept(requests, how, owners, ring, device) if owners is not None else None)


def _cut(requests: Requests, how: Served) -> np.ndarray:
    """int64 (pieces, 4): request, its first token among the step's, and the t of the piece's first and behind its
    last."""
    found = []
    counts = np.diff(requests.starts)
    for request, (length, count, row) in enumerate(zip(requests.lengths, counts, requests.starts, strict=False)):
        begin = int(length - count)
        while begin < length:
            end = int(length)
            if how.waits:
                end = min(end, how.sinks + how.own_block(begin) + how.block)
            found.append((request, int(row) + begin - int(length - count), begin, end))
            begin = end
    return np.array(found, dtype=np.int64).reshape(-1, 4)


def _alike(sizes: np.ndarray, how: Served) -> list[np.ndarray]:
    """Which pieces go together: those of one query, and all others; where pieces are no parts of blocks, those of as
    many queries, since what is padded could be as long as a prompt."""
    found = [sizes == 1, sizes > 1] if how.waits else [sizes == size for size in np.unique(sizes)]
    return [chosen for chosen in found if chosen.any()]


def _group(
    pieces: np.ndarray, queries: int, requests: Requests, how: Served, owners: np.ndarray | None, ring: int,
    device: torch.device,
) -> Group:  # fmt: skip
    request, row, begin, end = pieces.T
    count = end - begin
    place = np.arange(queries)[None] - (queries - count)[:, None]
    rows = row[:, None] + np.maximum(place, 0)
    real = np.flatnonzero(place >= 0)
    own = np.maximum(begin - how.sinks, 0) // how.block * how.block
    packed = own if how.waits else end
    pages = how.block // how.page_tokens
    width = -(-int(packed.max(initial=0)) // how.page_tokens)
    table = _pages(requests.table[request], pages, width)

    def there(x: np.ndarray, kind: torch.dtype = torch.int64) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(device, kind, non_blocking=True)

    found = Group(
        queries, there(rows), there(real), there(rows.reshape(-1)[real]), there(table, torch.int32),
        there(end, torch.int32), there(packed, torch.int32), there(np.maximum(begin - how.sinks, 0), torch.int32),
        int(end.max()), int(packed.max()),
    )  # fmt: skip
    if owners is None:
        return found
    x = np.arange(how.sinks + how.block)[None]
    token = np.where(x < how.sinks, x, x + own[:, None])  # the t of each row
    behind = token - how.sinks
    held = np.where(x < how.sinks, x, how.sinks + behind % ring)
    fresh = token - begin[:, None] + row[:, None]
    lasting = requests.starts[:-1][request]
    full = np.flatnonzero(end == own + how.sinks + how.block)
    to = requests.table[request[full], own[full] // how.block] if len(full) else np.zeros(0, dtype=np.int64)
    full_table = _pages(to[:, None], pages, pages)
    new = fresh >= lasting[:, None]
    return Group(
        **{**vars(found), "held": there(held), "fresh": there(np.clip(fresh, 0, int(requests.starts[-1]) - 1)),
           "new": there(new, torch.bool), "slots": there(owners[request]), "full": there(full),
           "full_table": there(full_table, torch.int32)}
    )  # fmt: skip


def _pages(blocks: np.ndarray, pages: int, width: int) -> np.ndarray:
    """The pages of blocks (n, blocks): (n, width + 1), the last of nothing."""
    every = (blocks[:, :, None].astype(np.int64) * pages + np.arange(pages)).reshape(
        len(blocks), blocks.shape[1] * pages
    )[:, :width]
    return np.pad(every, ((0, 0), (0, width + 1 - every.shape[1])))


def _slots_of(requests: Requests, how: Served, slots: Slots | None, draft: int) -> np.ndarray:
    """The slot of each request."""
    if requests.names is not None:
        return requests.names.astype(np.int64)
    assert slots is not None
    counts, found, using = np.diff(requests.starts), [], set[int]()
    for length, count, blocks in zip(requests.lengths, counts, requests.table, strict=False):
        before = int(length - count)
        known = before > 0 and (how.sinks > 0 or before % how.block > 0)
        slot = slots.take(int(blocks[_block(before, how)]) if known else None, using)
        using.add(slot)
        found.append(slot)
        last = {_block(int(length), how), _block(max(1, int(length) - draft), how)}
        slots.keep(slot, tuple(int(blocks[one]) for one in sorted(last)))
    return np.array(found, dtype=np.int64)


def _block(tokens: int, how: Served) -> int:
    """Which of its blocks holds the last of so many tokens."""
    return max(0, tokens - 1 - how.sinks) // how.block


def _kept(
    requests: Requests, how: Served, owners: np.ndarray, ring: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Where tokens of the step stand among exact rows behind it: sinks, and the newest that have room."""
    slot, row, token = [], [], []
    counts = np.diff(requests.starts)
    for owner, length, count, start in zip(owners, requests.lengths, counts, requests.starts, strict=False):
        t = np.arange(length - count, length)
        stays = (t < how.sinks) | (t >= length - ring)
        t = t[stays]
        slot.append(np.full(len(t), owner))
        row.append(np.where(t < how.sinks, t, how.sinks + (t - how.sinks) % ring))
        token.append(t - (length - count) + start)
    found = (torch.from_numpy(np.concatenate(part).astype(np.int64)) for part in (slot, row, token))
    at, where, which = (part.to(device, non_blocking=True) for part in found)
    return at, where, which
