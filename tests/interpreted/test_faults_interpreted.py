"""Faults that only the Triton kernels can have: float16 operands, rows of a program, offsets, empty splits."""

from __future__ import annotations

from dataclasses import replace

import law_cases  # noqa: F401  (one thread)
import pytest
import torch

from kvdsl.codegen import build
from kvdsl.quantized_cache import QuantizedCache
from kvdsl.schemes import ALL, kivi2, token4
from kvdsl.shape import Shape
from kvdsl.testing import LAWS, Case
from kvdsl.testing.attention import attend, require_close, step_of
from kvdsl.testing.driving import Pages, new_pages, pack

SHORT = kivi2.with_(**{"recent.tokens": 32})


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 95, 97, 127, 128, 129])
def test_any_length(tokens: int) -> None:
    for scheme in (token4, SHORT):
        LAWS["decode_is_attention"](Case(scheme, Shape(32, 1, 2), "triton", tokens=tokens, seed=tokens))


@pytest.mark.parametrize("group", [3, 7, 8, 16, 71])
def test_any_number_of_query_heads(group: int) -> None:
    for law in ("decode_is_attention", "extend_is_attention")[: 2 if group < 10 else 1]:
        LAWS[law](Case(SHORT, Shape(64, 1, group), "triton", tokens=101))


def test_nothing_at_all() -> None:
    kernels = build(token4, Shape(32, 1, 2), "triton")
    none = QuantizedCache(kernels, 0)
    x = torch.zeros(0, 1, 70, 32, dtype=torch.float16)
    out, lse = none.append_and_attend(torch.zeros(0, 2, 1, 32, dtype=torch.float16), x, x)
    assert out.shape == (0, 2, 1, 32) and lse.shape == (0, 2, 1)
    empty = QuantizedCache(kernels, 2)
    x = torch.zeros(2, 1, 0, 32, dtype=torch.float16)
    empty.append(x, x)
    assert empty.dense("keys").shape == (2, 1, 0, 32) and empty.lengths == (0, 0)


@pytest.mark.parametrize("name", ["kivi2", "token4", "int8_tensor", "fp16"])
def test_a_large_query(name: str) -> None:
    """Scores of 1e4 times a usual query, where float16 products of it would overflow."""
    case = Case(ALL[name], Shape(64, 2, 4), "triton", batch=2, tokens=150)
    for queries in (1, 3):
        step = step_of(case, queries)
        step = replace(step, q=(step.q.float() * 1e4).clamp(-65504, 65504).half(), options={"scaling": 1e-6})
        require_close(case, step, attend(case, step))


@pytest.mark.parametrize("name", ["kivi2", "token4", "fp16"])
@pytest.mark.parametrize("splits", [1, 4])
def test_a_query_that_sees_nothing(name: str, splits: int) -> None:
    """Every split of the first sequence is empty; of the second some are."""
    case = Case(ALL[name], Shape(64, 2, 4), "triton", batch=2, tokens=150)
    for queries in (1, 3):
        step = step_of(case, queries, ragged=False)
        step = replace(step, options={**step.options, "start": [150, 0]})
        out, lse = attend(case, step, splits)
        assert not out[0].any() and bool((lse[0] == -torch.inf).all()) and bool(lse[1].isfinite().all())
        require_close(case, step, (out, lse))


@pytest.mark.parametrize("name", ["token4", "kivi2", "int8_tensor", "fp16", "fp32"])
def test_a_page_far_away(name: str) -> None:
    """Pages beyond 2^31 elements of a pool: written, decoded and attended like the first ones.

    Memory that nobody touches is not taken, so the pool costs its address space alone."""
    case = Case(ALL[name], Shape(64, 1, 2), "triton", tokens=128)
    kernels, (k, v) = case.kernels, case.pair(128)
    params = case.params(k, v)
    near = new_pages(kernels, 1, 128)
    far = Pages(torch.empty(5 * 2**31 // kernels.page_bytes, kernels.page_bytes, dtype=torch.uint8), near.table.clone())
    far.table[0] = torch.arange(len(far.pool) - near.table.shape[1], len(far.pool))
    for page in far.table[0].tolist():
        far.pool[page] = 0x5A
    for pages in (near, far):
        for side, x in (("keys", k), ("values", v)):
            pack(kernels, side, x, [0], [128], pages, params)  # type: ignore[arg-type]
    assert torch.equal(far.content(), near.content())
    q = case.query(1)
    for side in ("keys", "values"):
        one, other = (kernels.unpack(side, p.pool, p.table, 0, 128, params) for p in (near, far))  # type: ignore[arg-type]
        assert torch.equal(one, other)
    one, other = (kernels.scores(q, p.pool, p.table, 128, params) for p in (near, far))
    assert torch.equal(one, other)
    state = replace(step_of(case, 1).state(case), packed_keys=torch.tensor([128], dtype=torch.int32))
    state = replace(state, packed_values=state.packed_keys, packed_most=128, length=state.packed_keys, longest=128)
    found = [kernels.attend(q, replace(state, pool=p.pool, table=p.table), params, 2) for p in (near, far)]
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
