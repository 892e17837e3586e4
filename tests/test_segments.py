"""Attention over segments of a cache, each under a scheme of its own, on the torch backend."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from law_cases import RARE, fixed
from segment_cases import attended, cut, require_union

from kvdsl.errors import BackendError, ShapeError
from kvdsl.kernels import Segment, attend_segments
from kvdsl.schemes import ALL
from kvdsl.shape import Shape
from kvdsl.testing import Case, cases, schemes, shapes
from kvdsl.testing.data import MODEST

SMALL = Shape(64, 2, 4)
MIXED = ("kivi2", "turboquant2", "fp16")


def few(*names: str, shape: Shape = SMALL, tokens: int = 300, batch: int = 2, seed: int = 1) -> list[Case]:
    every = ALL | RARE
    return [Case(every[name], shape, "torch", batch=batch, tokens=tokens, seed=seed) for name in names]


@fixed(examples=25)
@given(st.data())
def test_a_cache_of_any_scheme_may_be_cut_anywhere(data: Any) -> None:
    scheme = data.draw(schemes())
    case = data.draw(cases(scheme, data.draw(shapes(scheme, widest=64)), "torch", kinds=MODEST, batch=2))
    found = cut([case] * data.draw(st.integers(1, 3)), data.draw(st.sampled_from((1, 3))))
    require_union(found, attended(found))


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("softcap", [False, True])
@pytest.mark.parametrize("names", [MIXED, ("quarot4", "qjl", "gear2"), ("bands", "fp16")], ids="-".join)
def test_segments_may_be_of_different_schemes(names: tuple[str, ...], softcap: bool, queries: int) -> None:
    found = cut(few(*names, shape=replace(SMALL, softcap=softcap)), queries)
    require_union(found, attended(found))


@pytest.mark.parametrize("queries", [1, 3])
def test_segments_and_sequences_may_be_empty(queries: int) -> None:
    """One without tokens is not asked; one that a sequence has no tokens in adds nothing to it."""
    found = cut(few(*MIXED, "token4"), queries, cuts=[(0, 0, 180), (0, 150, 150)])
    assert [one.step.lengths for one in found] == [(0, 0), (0, 150), (180, 0), (120, 150)]
    got = attended(found)
    require_union(found, got)
    for one, other in zip(got, attended(found[1:]), strict=True):
        assert torch.equal(one, other)
    out, lse = attended([found[0]])
    assert not out.any() and (lse == -torch.inf).all()


@pytest.mark.parametrize("queries", [1, 3])
def test_their_order_is_no_matter(queries: int) -> None:
    found = cut(few(*MIXED), queries)
    (out, lse), (other, other_lse) = attended(found), attended(found[::-1])
    assert torch.allclose(lse, other_lse, rtol=1e-6, atol=1e-6)
    assert torch.allclose(out, other, rtol=2.0**-10, atol=1e-6)


@pytest.mark.parametrize("window", [7, 100, 1000])
@pytest.mark.parametrize("queries", [1, 3])
def test_windows_reach_into_older_segments(queries: int, window: int) -> None:
    found = cut(few(*MIXED), queries, cuts=[(130, 240)] * 2, window=window)
    assert [one.ahead for one in found] == [170, 60, 0]
    require_union(found, attended(found))


def test_one_segment_is_attention_itself() -> None:
    (one,) = cut(few("kivi2"), 3)
    kernels, state, params, _ = one.segment()
    for got, want in zip(attended([one]), kernels.attend(one.step.q, state, params), strict=True):
        assert torch.equal(got, want)


def test_schemes_that_are_compiled_otherwise_are_refused() -> None:
    found = [one.segment() for one in cut(few("kivi2", "fp16"), 1)]
    query = torch.zeros(2, 4, 1, 64, dtype=torch.float16)
    with pytest.raises(ShapeError, match="segments: none; give those of the cache"):
        attend_segments(query, [])
    other = Segment(replace(found[1].kernels, backend="triton"), *found[1][1:])
    with pytest.raises(BackendError, match=r"segments\[1\]: compiled for triton, segments\[0\] for torch; build all"):
        attend_segments(query, [found[0], other])
    other = Segment(replace(found[1].kernels, shape=Shape(64, 4, 4)), *found[1][1:])
    with pytest.raises(ShapeError, match=r"segments\[1\]: Shape\(.*kv_heads=4.*, segments\[0\]: Shape"):
        attend_segments(query, [found[0], other])
