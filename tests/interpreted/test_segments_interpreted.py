"""Attention over segments of a cache in Triton's interpreter: partials of several kernels in one buffer."""

from __future__ import annotations

import pytest
import torch
from segment_cases import attended, cut, require_union

from kvdsl.schemes import ALL
from kvdsl.shape import Shape
from kvdsl.testing import Case

SHAPE = Shape(64, 1, 2)
KINDS = {
    "plain": ("kivi2", "token4", "fp16"),
    "one mapped back": ("kivi2", "turboquant2", "fp16"),
    "all mapped back": ("quarot4", "turboquant2"),
    "sums": ("gear2", "fp16"),
}


def few(*names: str, shape: Shape = SHAPE, tokens: int = 200) -> list[Case]:
    return [Case(ALL[name], shape, "triton", batch=2, tokens=tokens, seed=1) for name in names]


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_segments_may_be_of_different_schemes(kind: str, queries: int) -> None:
    found = cut(few(*KINDS[kind]), queries)
    require_union(found, attended(found))


def test_programs_may_have_other_rows() -> None:
    """Seven query heads of nine queries are four programs of 16 rows, or eight of 8."""
    shape = Shape(64, 1, 7, softcap=True)
    cases = few("fp16", "qjl", "kivi2", shape=shape, tokens=150)
    assert {case.kernels.plan.rows(many=True) for case in cases} == {8, 16}
    found = cut(cases, 9)
    require_union(found, attended(found, 3))


def test_segments_and_sequences_may_be_empty() -> None:
    found = cut(few("kivi2", "turboquant2", "fp16"), 1, cuts=[(0, 130), (0, 0)])
    got = attended(found)
    require_union(found, got)
    for one, other in zip(got, attended(found[1:]), strict=True):
        assert torch.equal(one, other)


def test_their_order_is_no_matter() -> None:
    found = cut(few("token4", "turboquant2"), 3)
    (out, lse), (other, other_lse) = attended(found), attended(found[::-1])
    assert torch.allclose(lse, other_lse, rtol=1e-6, atol=1e-6)
    assert torch.allclose(out, other, rtol=2.0**-10, atol=1e-6)


@pytest.mark.parametrize("queries", [1, 3])
def test_windows_reach_into_older_segments(queries: int) -> None:
    found = cut(few("kivi2", "token4"), queries, cuts=[(130,)] * 2, window=100)
    require_union(found, attended(found))


@pytest.mark.parametrize("name", ["kivi2", "quarot4"])
def test_one_segment_is_attention_itself(name: str) -> None:
    (one,) = cut(few(name), 1)
    kernels, state, params, _ = one.segment()
    for got, want in zip(attended([one]), kernels.attend(one.step.q, state, params), strict=True):
        assert torch.equal(got, want)
