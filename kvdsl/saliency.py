"""How much attention tokens receive: sums over rows of the softmax matrix, which is nowhere held.

Two kernels find them from what is stored (see KernelSet): `reach` the log-sum-exp of each row over all that its query
sees, `received` the sums of a token's weights, and of their squares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .kernels import AttentionState, Fold, KernelSet, Params
from .measuring import Affine
from .pages import upload
from .probes import probe_rows
from .routing import column
from .tiers import Metric
from .watch import Watch

if TYPE_CHECKING:
    from .front import Front
    from .segment_cache import SegmentCache

EVERYWHERE = 1 << 30
"""The position of a query that sees all tokens of a tier."""


class Read(NamedTuple):
    """Something that a query reads: the exact tokens, of which it sees those up to its own, or those of a tier."""

    kernels: KernelSet
    state: AttentionState
    params: Params
    keys: Affine | None = None
    values: Affine | None = None
    causal: bool = False

    def fold(self, query: Tensor) -> Fold | None:
        """What is put back around the kernels, where something was taken out of what they read."""
        if self.keys is None and self.values is None:
            return None
        met, bias = (query, None) if self.keys is None else self.keys.met(query)
        factor = None if self.values is None else self.values.factor.float()
        shift = None if self.values is None or self.values.shift is None else self.values.shift.float()
        return Fold(met, None if bias is None else bias * self.state.scaling, factor, shift)


@dataclass(frozen=True)
class Rows:
    """Queries (B, Hq, P, D) and, of each, its place among the exact tokens, int32 (B, P): -1 where it counts for
    nothing; `gone`, int32 (B, 1): how many tokens before it have left these."""

    query: Tensor
    position: Tensor
    gone: Tensor

    def met(self, read: Read) -> tuple[Tensor, Tensor, Tensor | float]:
        """The query as the keys of `read` meet it, its positions there, and what is added to scaled scores."""
        position = self.position
        if read.state.places is not None:
            position = torch.where(position < 0, -1, position + self.gone)
        elif not read.causal:
            position = torch.where(position < 0, -1, EVERYWHERE)
        if read.keys is None:
            return self.query, position, 0.0
        turned, shift = read.keys.met(self.query)
        return turned, position, 0.0 if shift is None else shift * read.state.scaling


def reach(rows: Rows, reads: Sequence[Read]) -> Tensor:
    """The log-sum-exp of each row over everything that is read: float32 (B, Hq, P)."""
    found: Tensor | None = None
    for read in reads:
        if read.state.longest:
            query, position, shift = rows.met(read)
            lse = read.kernels.reach(query, position, read.state, read.params) + shift
            found = lse if found is None else torch.logaddexp(found, lse)
    assert found is not None
    return found


def received(rows: Rows, lse: Tensor, read: Read) -> tuple[Tensor, Tensor]:
    """The sums of the weights, and of their squares, that each token of `read` receives: float32 (B, H, tokens)."""
    query, position, shift = rows.met(read)
    return read.kernels.received(query, position, lse - shift, read.state, read.params)


def carried(
    query: Tensor, counts: Sequence[int], lse: Tensor | None, reads: Sequence[Read], front: Front,
    tiers: Sequence[SegmentCache],
) -> list[Tensor]:  # fmt: skip
    """The sums of all tokens with what the queries (B, Hq, Q, D) of a step, the last counts_b of which are real, give
    them: of the exact tokens, then of each tier; those before are as they were."""
    queries, device = query.shape[2], query.device
    place = torch.arange(queries, device=device)
    position = place + column(front.held, device) - queries
    position = torch.where(place >= queries - column(counts, device), position, -1).to(torch.int32)
    rows = Rows(query, position, upload(front.gone, device)[:, None])
    lse = reach(rows, reads) if lse is None else lse
    exact, *others = (received(rows, lse, read) if read.state.longest else None for read in reads)
    sums = front.sums
    if exact is not None and (most := max(front.waiting, default=0)):
        skip = column([min(front.sinks, n) for n in front.lengths], device)
        more = torch.stack(exact[: len(sums)])
        at = (torch.arange(most, device=device) + skip)[:, None].expand(*more.shape[:-1], -1)
        given = more.gather(3, at.clamp(max=more.shape[3] - 1)).masked_fill(at >= more.shape[3], 0.0)
        sums = sums.scatter_add(3, front.places(most)[:, None].expand_as(at), given)
    kept = [tier.beside.sums for tier in tiers]
    for number, found in enumerate(others):
        if found is not None:
            more = torch.stack(found[: len(sums)])
            kept[number] = kept[number] + torch.nn.functional.pad(more, (0, kept[number].shape[3] - more.shape[3]))
    return [sums, *kept]


def chosen_rows(watch: Watch, first: Sequence[bool], lengths: Sequence[int], gone: Sequence[int]) -> Rows:
    """The rows that a decision asks for, of queries since the last one; `first_b`: it is the first about sequence b;
    lengths_b tokens so far, gone_b of which stand in tiers."""
    assert watch.router is not None
    query, places, positions = watch.query(), list[list[int]](), list[list[int]]()
    for here, one, length, left in zip(watch.places(), first, lengths, gone, strict=True):
        n = len(here)
        last = watch.metric(one) == "last"
        rows = [n - 1] * min(1, n) if last else probe_rows(watch.router.probes, n, length)
        rows = rows if n else []
        places.append([here[row] for row in rows])
        positions.append([length - n + row - left for row in rows])
    most = max(map(len, places), default=0)
    places = [[0] * (most - len(row)) + row for row in places]
    positions = [[-1] * (most - len(row)) + row for row in positions]
    index = upload(places, query.device, torch.int64).view(len(places), most)
    picked = query.gather(2, index[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
    return Rows(picked, upload(positions, query.device).view(len(positions), most), upload(gone, query.device)[:, None])


def importance(
    metric: Metric, first: Tensor, positions: Tensor, lengths: Sequence[int], queries: Sequence[int],
    window: int | None = None,
) -> Tensor:  # fmt: skip
    """How much tokens matter, float32 like first (B, H, T), the sums of their weights, by their positions t int (B, 1
    or H, T) in sequences of lengths_b tokens, `queries_b` of whose queries are at hand; of attention in a sliding
    window, if any."""
    if metric in ("accumulated", "last"):
        return first
    return first / seeing(positions, lengths, queries if metric == "normalized" else lengths, window)


def seeing(positions: Tensor, lengths: Sequence[int], queries: Sequence[int], window: int | None) -> Tensor:
    """How many of the newest queries_b queries can see the tokens at these positions, 1 at least."""
    end, rows = (column(counts, positions.device)[..., None] for counts in (lengths, queries))
    last = end if window is None else torch.minimum(end, positions + window)
    return (last - torch.maximum(positions, end - rows)).clamp(min=1)


def deviation(
    first: Tensor, second: Tensor, positions: Tensor, lengths: Sequence[int], group: int, window: int | None = None
) -> Tensor:
    """The standard deviation of a token's weights over the queries that could see it, each of `group` heads, float32
    like first (B, H, T)."""
    seen = group * seeing(positions, lengths, lengths, window)
    return (second / seen - (first / seen).square()).clamp(min=0).sqrt()


def pooled(importance: Tensor, neighbours: int) -> Tensor:
    """The largest importance among so many neighbouring tokens (B, H, T)."""
    if neighbours == 1 or not importance.numel():
        return importance
    return torch.nn.functional.max_pool1d(importance, neighbours, 1, neighbours // 2)
