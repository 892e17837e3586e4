"""Kernels that are told where tokens stand, beside those of tokens in their order, for either backend."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from kvdsl.codegen import build
from kvdsl.errors import BackendError
from kvdsl.kernels import AttentionState, Backend, KernelSet, Places
from kvdsl.quantized_cache import QuantizedCache
from kvdsl.scheme import (
    ALL,
    Block,
    Codebook,
    Permute,
    PreRope,
    Recent,
    Rotate,
    Scheme,
    Sinks,
    Sparse,
    Store,
    Uniform,
    per_channel,
    per_token,
)
from kvdsl.shape import Shape
from kvdsl.testing import Case
from kvdsl.testing.driving import device_of, ready
from kvdsl.window import windows

TOKENS, LENGTHS, SINKS = 157, (157, 140), 3
SINGLE = Sparse(line=Block(ALL, channels=1), fill="clamp", when="calibrated")
FOUR = Store(Uniform(4), scale=per_token())


def keys(store: Store, recent: int = 21) -> Scheme:
    """Tokens that have nothing in common, behind sinks and before a window."""
    return Scheme(keys=store, values=FOUR, sinks=Sinks(SINKS), recent=Recent(recent))


SCHEMES = {
    "plain": keys(FOUR),
    "before RoPE": keys(FOUR.with_(transform=PreRope())),
    "pairs side by side": keys(Store(Codebook(3, "normal"), scale=per_token(), transform=PreRope(True))),
    "mixed channels": keys(FOUR.with_(transform=(PreRope(), Rotate("hadamard")))),
    "an order of channels": keys(FOUR.with_(transform=(PreRope(), Permute()))),
    "single numbers": keys(
        Store(Uniform(3), scale=per_channel(when="calibrated"), transform=PreRope(), outliers=SINGLE), 64
    ),
    "numbers": keys(Store(transform=PreRope())),
}


class Both(NamedTuple):
    """The same tokens in their order, and in other places, each head's its own: `place` of each, int64 (B, H, T)."""

    plain: KernelSet
    placed: KernelSet
    state: AttentionState
    moved: AttentionState
    params: dict[str, Tensor]
    place: Tensor
    query: Tensor
    packed: list[int]


def both(scheme: Scheme, backend: Backend, queries: int = 3) -> Both:
    """Two ragged sequences.  Sinks, packed tokens and those of the window stay among themselves."""
    case = Case(scheme, Shape(32, 2, 4), backend, batch=2, tokens=TOKENS, seed=4)
    plain, placed = case.kernels, build(scheme, replace(case.shape, placed=True), backend)
    k, v = case.pair(TOKENS)
    params, device, shift = case.params(k, v), device_of(plain), 5
    packed = [sorted(one.packed(length) for one in windows(scheme).values()) for length in LENGTHS]
    source = torch.Generator().manual_seed(9)
    place = torch.empty(2, 2, TOKENS, dtype=torch.int64)
    for b, length in enumerate(LENGTHS):
        for h in range(2):
            ends = [0, SINKS, *(SINKS + end for end in packed[b]), length, TOKENS]
            parts = [
                low + torch.randperm(high - low, generator=source) for low, high in zip(ends, ends[1:], strict=False)
            ]
            place[b, h] = torch.cat(parts)
    order = place.argsort(2)  # which token stands in each place
    at = torch.nn.functional.pad(order - shift, (0, 6), value=1 << 20).to(device, torch.int32)
    places = Places(at, TOKENS, shift, torch.tensor(LENGTHS, dtype=torch.int32, device=device))
    caches = [QuantizedCache(one, 2, params=params, device=device) for one in (plain, placed)]
    lead = [TOKENS - length for length in LENGTHS]
    for cache, index, given in ((caches[0], torch.arange(TOKENS).expand(2, 2, -1), None), (caches[1], order, places)):
        rows = [_aligned(_picked(x, index), lead).to(device) for x in (k, v)]
        cache.append(*rows, counts=LENGTHS, places=given)
    moved = replace(caches[1].state(), places=places)
    query, least = case.query(queries).to(device), [ends[0] for ends in packed]
    return Both(plain, placed, caches[0].state(), moved, ready(plain, params), place, query, least)


def _picked(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(2, index[..., None].expand_as(x))


def _aligned(x: Tensor, lead: list[int]) -> Tensor:
    """The first tokens of each sequence of x, right aligned."""
    return torch.stack([row.roll(n, 1) for row, n in zip(x, lead, strict=True)])


def tokens_may_stand_anywhere(name: str, backend: Backend) -> None:
    """Decoded tokens are the same bit for bit; scores, outputs and what tokens receive but for rounding."""
    one = both(SCHEMES[name], backend)
    least, most = min(one.packed), max(one.packed)
    behind = one.place[:, :, SINKS : SINKS + least] - SINKS
    pool, table = one.state.pool, one.state.table
    there = one.moved.pool, one.moved.table
    for side in ("keys", "values"):
        right = one.plain.unpack(side, pool, table, 0, least, one.params).cpu()[0]
        found = one.placed.unpack(side, *there, 0, most, one.params, one.moved.places)
        assert torch.equal(found.cpu()[0].gather(1, behind[0, ..., None].expand_as(right)), right)
    right = one.plain.scores(one.query, pool, table, least, one.params).cpu()
    found = one.placed.scores(one.query, *there, most, one.params, one.moved.places).cpu()
    index = behind.repeat_interleave(2, 1)[:, :, None].expand_as(right)
    assert torch.allclose(found.gather(3, index), right, atol=0.03)
    for window in (None, 50):
        states = replace(one.state, window=window), replace(one.moved, window=window)
        given = [
            kernels.attend(one.query, state, one.params)
            for kernels, state in zip((one.plain, one.placed), states, strict=True)
        ]
        for got, want in zip(given[1], given[0], strict=True):
            assert torch.allclose(got.float(), want.float(), atol=4e-3), f"window {window}"


def tokens_receive_the_same_anywhere(name: str, backend: Backend) -> None:
    """Rows at positions, in any order; in a window the sums are those of the rows that see a token."""
    one = both(SCHEMES[name], backend)
    position = torch.tensor([[156, 60, -1], [20, 139, 100]], dtype=torch.int32, device=one.query.device)
    lse = one.plain.reach(one.query, position, one.state, one.params)
    found = one.placed.reach(one.query, position, one.moved, one.params)
    assert torch.allclose(found, lse, atol=4e-3)
    want = one.plain.received(one.query, position, lse, one.state, one.params)
    got = one.placed.received(one.query, position, found, one.moved, one.params)
    for right, sums in zip(want, got, strict=True):
        assert torch.allclose(sums.cpu().gather(2, one.place), right.cpu(), atol=4e-3)
    moved = replace(one.moved, window=50)
    lse = one.placed.reach(one.query, position, moved, one.params)
    first, _ = one.placed.received(one.query, position, lse, moved, one.params)
    first = first.cpu().gather(2, one.place)
    seen = torch.zeros(2, TOKENS, dtype=torch.bool)
    for b, row in enumerate(position.tolist()):
        for p in row:
            seen[b, max(0, p - 49) : p + 1] = True
    assert not first[~seen[:, None].expand_as(first)].any()
    rows = (position >= 0).sum(1).cpu() * 2.0
    assert torch.allclose(first.sum(2), rows[:, None].expand(2, 2), atol=1e-3)


def a_wrong_position_is_seen(backend: Backend) -> None:
    """One packed token of a head three positions on: what is decoded of it, and no other, is another key."""
    one = both(SCHEMES["before RoPE"], backend)
    places = one.moved.places
    assert places is not None
    at = places.at.clone()
    at[0, 1, SINKS + 7] += 3
    wrong = places._replace(at=at)
    args = one.moved.pool, one.moved.table, 0, 100, one.params
    right, found = (one.placed.unpack("keys", *args, given) for given in (places, wrong))
    differs = (right != found).any(-1)
    assert differs.nonzero().tolist() == [[0, 1, 7]]
    outputs = [
        one.placed.attend(one.query, replace(one.moved, places=given), one.params)[0] for given in (places, wrong)
    ]
    assert not torch.equal(*outputs)
    assert torch.equal(outputs[0][:, :2], outputs[1][:, :2])


def places_are_asked_for(backend: Backend) -> None:
    """By kernels that know positions, and by no others."""
    one = both(SCHEMES["plain"], backend)
    with pytest.raises(BackendError, match="places: missing; these kernels are of tokens in any order"):
        one.placed.attend(one.query, one.state, one.params)
    with pytest.raises(BackendError, match="places: these kernels are of tokens in the order of their places"):
        one.plain.attend(one.query, one.moved, one.params)
