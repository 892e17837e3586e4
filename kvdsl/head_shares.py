"""Heads of one layer over the ranks of a tensor-parallel model: what a rank needs of a scheme and of its numbers, and
which schemes take something from heads of several ranks.

Every rank computes the keys and values of neighbouring kv heads, as many as any other, and of the query heads that read
them (Megatron-LM, arXiv 1909.08053, section 3).  A rank's cache is that of its heads alone: nothing is exchanged.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import Fault, SchemeError
from .head_groups import HeadGroup, head_groups
from .kernels import Params
from .params import wanted
from .part import ALL, Count
from .scheme import Rotate, Saliency, Scale, Scheme, Sparse
from .shape import Shape
from .tier_rules import decides_by_position

MAPS = ("encode", "decode", "encode_shift", "decode_shift")
"""What may be given in place of a transform's numbers, see `kvdsl.params.checked`."""
WIDTH = 128
"""Channels of a head, of which the axis of heads does not depend."""
TRIED = 16
"""Tokens and channels of the numbers that a router is asked about."""


@dataclass(frozen=True)
class HeadShare:
    """The kv heads of a layer of `kv_heads` that rank `rank` of `ranks` has: `ranks` divides `kv_heads`."""

    rank: int
    ranks: int
    kv_heads: int

    @property
    def count(self) -> int:
        """How many."""
        return self.kv_heads // self.ranks

    @property
    def first(self) -> int:
        """The first of them, counted over all ranks."""
        return self.rank * self.count

    def own(self, heads: Sequence[int]) -> list[int]:
        """The places among heads, counted over all ranks, of those that are this rank's."""
        return [place for place, head in enumerate(heads) if head // self.count == self.rank]

    def parts(self, heads: Sequence[int], size: Count) -> bool:
        """Whether of these heads, taken `size` at a time, some that belong together are of several ranks."""
        step = size if isinstance(size, int) else len(heads)
        return any(len({head // self.count for head in heads[i : i + step]}) > 1 for i in range(0, len(heads), step))


def faults(scheme: Scheme, share: HeadShare) -> tuple[Fault, ...]:
    """What of a layer's scheme spans heads of several ranks, the same on every rank; none where each rank can keep its
    heads by themselves.  The scheme is legal for all heads of the layer."""
    groups = head_groups(scheme, share.kv_heads)
    return tuple(dict.fromkeys(fault for group in groups for fault in _of_group(group, share)))


def refuse_spanning(scheme: Scheme, share: HeadShare | None) -> None:
    """SchemeError with every fault, if there is one; none of a layer that is whole."""
    if share is not None and (found := faults(scheme, share)):
        raise SchemeError(found)


def scheme_of(scheme: Scheme, share: HeadShare) -> Scheme:
    """The scheme of a rank's heads: a table of heads is one of those, counted from 0."""
    if not scheme.heads:
        return scheme
    listed = (group for group in head_groups(scheme, share.kv_heads) if group.listed)
    return dc.replace(scheme, heads={key: group.scheme for group in listed if (key := _counted(group, share))})


def params_of(scheme: Scheme, share: HeadShare, params: Params) -> dict[str, Tensor]:
    """A rank's part of the calibrated numbers of a layer, which are given for all of its heads under the names of
    `kvdsl.params.wanted`, and fit: rows of its heads where a number has an axis of heads, the whole where not."""
    mine = {group.heads: group for group in head_groups(scheme_of(scheme, share), share.count)}
    found: dict[str, Tensor] = {}
    for group in head_groups(scheme, share.kv_heads):
        key = _counted(group, share)
        if key:
            cut = _rows(group, share, group.params(params))
            found |= {mine[key].place + name: x for name, x in cut.items()}
    return found


def _counted(group: HeadGroup, share: HeadShare) -> tuple[int, ...]:
    """A rank's heads of a group, counted from its first."""
    return tuple(group.heads[place] - share.first for place in share.own(group.heads))


def _rows(group: HeadGroup, share: HeadShare, params: Params) -> dict[str, Tensor]:
    """The numbers of a group, cut: the axis of heads is the one that is shorter where there are fewer of them."""
    places, found = share.own(group.heads), dict(params)
    whole, part = (wanted(group.scheme, Shape(WIDTH, n)) for n in (len(group.heads), len(places)))
    for name, x in params.items():
        if name.rpartition(".")[2] in MAPS:
            sizes = [(len(group.heads), len(places))]
        else:
            sizes = [*zip(whole.get(name, ()), part.get(name, ()), strict=True)]
        for axis, (rows, mine) in enumerate(sizes):
            if rows != mine and isinstance(x, Tensor) and x.shape[axis : axis + 1] == (rows,):
                each = len(group.heads) // rows  # heads that share a row
                index = torch.tensor(places[::each], device=x.device) // each
                found[name] = x.index_select(axis, index).contiguous()
    return found


def _of_group(group: HeadGroup, share: HeadShare) -> Iterator[Fault]:
    """Why heads of a group cannot be parted."""
    for place, what, size in _spans(group.scheme):
        if share.parts(group.heads, size):
            sizes = range(1, share.count + 1)
            fits = [str(n) for n in sizes if len(group.heads) % n == 0 and not share.parts(group.heads, n)]
            many = f"all {len(group.heads)}" if size is ALL else str(size)
            fact = f"{what} {many} heads, of which a rank of {share.ranks} has {share.count}"
            yield Fault(f"{group.place}{place}", fact, f"use heads={' or '.join(fits)}, or fewer ranks")
    yield from _of_router(group, share)


def _spans(scheme: Scheme) -> Iterator[tuple[str, str, Count]]:
    """Where something is taken from several heads together: the field, what it is, and from how many."""
    for place, part in scheme.walk():
        if isinstance(part, Scale):
            if part.block.heads is not ALL or part.when == "online":  # a given one is the same on all ranks
                yield f"{place}.block.heads", "a scale is measured over", part.block.heads
        elif isinstance(part, Rotate):
            yield f"{place}.heads", "a vector is rotated with those of", part.heads
        elif isinstance(part, Sparse) and part.when == "online":
            yield f"{place}.line.heads", "the largest numbers are sought among", part.line.heads


def _of_router(group: HeadGroup, share: HeadShare) -> Iterator[Fault]:
    """Why a router cannot choose by a rank's heads alone: one of the user's own is asked about a few numbers."""
    router = group.scheme.router
    if decides_by_position(router) or not share.parts(group.heads, ALL):
        return
    assert router is not None
    if isinstance(router, Saliency):
        if router.per == "layer":
            fact = f"tokens are chosen by a sum over all {len(group.heads)} heads, of which a rank of {share.ranks} has"
            yield Fault(f"{group.place}router.per", f"{fact} {share.count}", "use per='kv_head', or one rank")
        return
    numbers = torch.randn(2, 1, len(group.heads), TRIED, TRIED, generator=torch.Generator().manual_seed(0))
    few = slice(len(group.heads) // 2)
    if not torch.equal(router.importance(*numbers)[:, few], router.importance(*numbers[:, :, few])):
        fact = f"{type(router).__name__} finds a token of a head important by other heads, and a rank has some of them"
        yield Fault(
            f"{group.place}router", fact, "let a head's importance() depend on that head alone, or use one rank"
        )
