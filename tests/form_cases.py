"""Steps of many queries, whose packed tokens are decoded once, for either backend."""

from __future__ import annotations

from dataclasses import replace

import place_cases
import pytest
import torch
from law_cases import ROUNDED
from segment_cases import attended, cut, require_union

from kvdsl.codegen import chunks
from kvdsl.kernels import Backend, attend_segments
from kvdsl.schemes import ALL
from kvdsl.shape import Shape
from kvdsl.testing import Case
from kvdsl.testing.attention import attend, require_close, step_of

SMALL = Shape(64, 1, 2)


def case(name: str, backend: Backend, shape: Shape = SMALL, tokens: int = 250) -> Case:
    return Case(ALL[name], shape, backend, batch=2, tokens=tokens, seed=1)


def chunks_go_on(name: str, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Working memory of one page at a time: the same but for rounding, whatever else is in the chunk."""
    one = case(name, backend)
    step = step_of(one, 40)
    whole = attend(one, step, form="dense")
    monkeypatch.setattr(chunks, "WORKING", 1)
    require_close(one, step, attend(one, step, form="dense"))
    for got, want in zip(attend(one, step, form="dense"), whole, strict=True):
        assert torch.allclose(got, want, atol=2e-3)


def rounded_queries_meet_decoded_keys(backend: Backend) -> None:
    """As they meet codes, and exact keys queries as they are, also in a tile of both; which shows where these are
    large."""
    one = Case(ROUNDED, SMALL, backend, batch=2, tokens=60, seed=1)
    step = step_of(one, 3)
    step = replace(step, q=4 * step.q)
    want, got = (attend(one, step, form=form) for form in ("extend", "dense"))
    other = attend(replace(one, scheme=ROUNDED.with_(queries=None)), step, form="dense")
    for found, right, plain in zip(got, want, other, strict=True):
        assert torch.allclose(found, right, atol=1e-2) and (plain - right).abs().max() > 0.1


def segments_may_be_read_in_any_form(backend: Backend) -> None:
    """All of them decoded once; and one, beside others whose pages are read."""
    found = cut([case(name, backend, tokens=200) for name in ("kivi2", "quarot4", "fp16")], 21)
    require_union(found, attended(found, form="dense"))


def places_may_be_any(name: str, backend: Backend) -> None:
    """Tokens in any order are what they are in their own, in a sliding window, too."""
    one = place_cases.both(place_cases.SCHEMES[name], backend, queries=9)
    for window in (None, 50):
        states = replace(one.state, window=window), replace(one.moved, window=window)
        want = one.plain.attend(one.query, states[0], one.params, form="extend")
        for kernels, state in zip((one.plain, one.placed), states, strict=True):
            got = kernels.attend(one.query, state, one.params, form="dense")
            for found, right in zip(got, want, strict=True):
                assert torch.allclose(found.float(), right.float(), atol=4e-3), f"window {window}"


def tiers_may_be_decoded_once(run_of: Case) -> None:
    """A cache with tiers: its segments, what is measured of their tokens given back."""
    from kvdsl.kernels import Segment
    from kvdsl.testing.tier_driving import Run

    run = Run.of(run_of)
    run.step([run_of.tokens - 12] * run_of.batch)
    cache, counts = run.cache, [12] * run_of.batch
    q, k, v = (run.chunk(x, counts).to(cache.device) for x in (run.q, run.k, run.v))
    step = cache.append(k, v, counts=counts)
    parts = [
        Segment(read.kernels, read.state if read.causal else replace(read.state, ahead=12), read.params, read.fold(q))
        for read in step.reads
    ]
    want, got = (attend_segments(q, parts, form=form) for form in ("extend", "dense"))
    for found, right in zip(got, want, strict=True):
        assert torch.allclose(found.float(), right.float(), atol=4e-3)
