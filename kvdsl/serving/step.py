"""One step of an engine, cut into pieces that kernels read alike: made once a step, used by every layer.

The tokens of all requests stand one behind the other.  A piece is tokens of one request in one block; pieces of as many
queries as others make a group, which is one call of kernels over a batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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
    longest, most    host: the largest length and packed
    zeros       int32 (n,)
    alone       the queries are all of the step's tokens in their order, one of each request
    due         (m,) the pieces that pack tokens, None for all: int32 tensors `first`, `begin` and `end` (m,) as for
                KernelSet.pack and `into` (m, pages), of places counted from the page that each begins in, and `reach`
    slots       (n,) the slot of each piece's request, or a slice where they lie so; None where nothing waits
    held, fresh, new   of exact rows (n, sinks + block): the row among a slot's, the token among the step's, and which
                of the two it is; None where nothing waits, and of requests of one token: theirs are read in the slots
    """

    queries: int
    rows: Tensor
    inverse: Tensor
    outputs: Tensor
    table: Tensor
    length: Tensor
    packed: Tensor
    longest: int
    most: int
    zeros: Tensor
    alone: bool
    due: Tensor | None
    first: Tensor
    begin: Tensor
    end: Tensor
    into: Tensor
    reach: tuple[int, int]
    slots: Tensor | slice | None = None
    held: Tensor | None = None
    fresh: Tensor | None = None
    new: Tensor | None = None


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
        groups = tuple(
            _group(pieces[chosen], requests, how, owners, ring, device) for chosen in _alike(pieces, requests, how)
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


def _alike(pieces: np.ndarray, requests: Requests, how: Served) -> list[np.ndarray]:
    """Which pieces go together: those of requests that have one token, and all others; where pieces are no parts of
    blocks, those of as many queries, since what is padded could be as long as a prompt."""
    sizes, single = pieces[:, 3] - pieces[:, 2], (np.diff(requests.starts) == 1)[pieces[:, 0]]
    found = [single, ~single] if how.waits else [sizes == size for size in np.unique(sizes)]
    return [chosen for chosen in found if chosen.any()]


def _group(
    pieces: np.ndarray, requests: Requests, how: Served, owners: np.ndarray | None, ring: int, device: torch.device
) -> Group:
    request, row, begin, end = pieces.T
    count = end - begin
    queries = int(count.max())
    place = np.arange(queries)[None] - (queries - count)[:, None]
    rows = row[:, None] + np.maximum(place, 0)
    real = np.flatnonzero(place >= 0)
    own = np.maximum(begin - how.sinks, 0) // how.block * how.block
    packed = own if how.waits else end
    blocks = requests.table[request]
    table = _pages(blocks, how, 0 * own, -(-int(packed.max(initial=0)) // how.page_tokens))
    single = bool((np.diff(requests.starts)[request] == 1).all())

    def there(x: np.ndarray, kind: torch.dtype = torch.int32) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(device, kind, non_blocking=True)

    def places(x: np.ndarray) -> Tensor:
        return there(x, torch.int64)

    due = np.flatnonzero(end == own + how.sinks + how.block) if how.waits else np.arange(len(end))
    start = own[due] if how.waits else begin[due]  # of what is packed, the first
    stop = start + (how.block if how.waits else count[due])
    ring_at = (0 if single else own[due]) if how.waits else begin[due]  # what stands in the first row of the ring
    origin = start // how.page_tokens * how.page_tokens
    pages = -(-int((stop - origin).max(initial=0)) // how.page_tokens)
    found = Group(
        queries, places(rows), places(real), places(rows.reshape(-1)[real]), there(table), there(end), there(packed),
        int(end.max()), int(packed.max()), there(0 * end),
        alone=single and queries == 1 and np.array_equal(row, np.arange(requests.starts[-1])),
        due=places(due) if how.waits else None, first=there(ring_at - origin), begin=there(start - origin),
        end=there(stop - origin), into=there(_pages(blocks[due], how, origin // how.page_tokens, pages)),
        reach=(0, pages * how.page_tokens),
    )  # fmt: skip
    if owners is None:
        return found
    slots = owners[request]
    if single:
        neighbours = slice(int(slots[0]), int(slots[0]) + len(slots))
        lie = np.array_equal(slots, np.arange(neighbours.start, neighbours.stop))
        return replace(found, slots=neighbours if lie else places(slots))
    x = np.arange(how.sinks + how.block)[None]
    token = np.where(x < how.sinks, x, x + own[:, None])  # the t of each row
    held = np.where(x < how.sinks, x, how.sinks + (token - how.sinks) % ring)
    fresh = token - begin[:, None] + row[:, None]
    new = fresh >= requests.starts[:-1][request][:, None]
    fresh = np.clip(fresh, 0, int(requests.starts[-1]) - 1)
    return replace(found, slots=places(slots), held=places(held), fresh=places(fresh), new=there(new, torch.bool))


def _pages(blocks: np.ndarray, how: Served, first: np.ndarray, width: int) -> np.ndarray:
    """Pages `first` to `first` + `width` of sequences whose blocks are given, and one more of nothing."""
    pages = how.block // how.page_tokens
    place = first[:, None] + np.arange(width)
    block = np.take_along_axis(blocks, np.minimum(place // pages, blocks.shape[1] - 1), 1)
    return np.pad(block * pages + place % pages, ((0, 0), (0, 1)))


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
