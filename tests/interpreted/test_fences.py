"""No kernel reads or writes beside its tensors: each is run on tensors that end at an inaccessible page."""

from __future__ import annotations

import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fences import SOUND, fenced, outcome, run_fenced

from kvdsl.codegen import bind, build
from kvdsl.kernels import KernelSet
from kvdsl.scheme import Scheme, Sinks
from kvdsl.schemes import fp16, int4_token_head, kivi2, token3, token4
from kvdsl.shape import Shape
from kvdsl.testing import Case
from kvdsl.testing.driving import attention_state, integers, packed, ready

SCHEMES = {
    "kivi2": kivi2.with_(**{"recent.tokens": 32}), "token3": token3.with_(sinks=Sinks(5)),
    "int4_token_head": int4_token_head, "fp16": fp16,
}  # fmt: skip
KERNELS = ("pack_keys", "pack_values", "unpack_keys", "unpack_values", "scores", "decode", "extend")
KERNELS += ("reach", "received")
FENCE = -signal.SIGSEGV


def _calls(scheme: Scheme, kernels: KernelSet, kernel: str, tokens: int) -> list[tuple[Any, ...]]:
    """The calls (method, its arguments) that run a kernel on a full page and on one that is not: lengths 64 + tokens
    and fewer, on tensors that hold not one element too many."""
    case = Case(scheme, kernels.shape, "triton", batch=2, tokens=64 + tokens, kind="normal", seed=3)
    block = case.block
    name, _, side = kernel.partition("_")
    params = ready(kernels, None)
    if name in ("decode", "extend", "reach", "received"):
        queries = 1 if name == "decode" else 3
        k, v = case.pair(case.tokens)
        lengths = (case.tokens, queries)
        state = attention_state(kernels, k, v, lengths, [n - queries for n in lengths])
        spare = 3  # rows that `attention_state` leaves over: here the ring ends with the last exact row
        rows = {f: getattr(state, f)[:, :, :-spare].contiguous() for f in ("key_rows", "value_rows")}
        state = replace(state, **rows, first=state.first)
        if name in ("reach", "received"):  # of probes at both ends, and nowhere
            q, position = case.query(queries), torch.tensor([[case.tokens - 1, -1, 0], [0, queries - 1, 9]]).int()
            lse = [torch.zeros(q.shape[:3])] * (name == "received")
            return [(name, q, position, *lse, state, params)]
        return [("attend", case.query(queries), state, params, splits) for splits in (1, 2)]
    count = case.tokens // block * block
    k, v = case.pair(count + case.sinks)
    pages = packed(kernels, k, v, {"keys": [count, block], "values": [count, block]})
    if name == "scores":
        return [("scores", case.query(queries), pages.pool, pages.table, count, params) for queries in (1, 2)]
    if name == "unpack":
        return [("unpack", side, pages.pool, pages.table, begin, count, params) for begin in (0, 33)]
    zero, ends, device = [0, 0], [count, block], torch.device("cpu")
    given = (integers(zero, device), case.sinks, integers(zero, device), integers(ends, device), (0, count))
    return [("pack", side, k if side == "keys" else v, *given, pages.pool, pages.table, params)]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", SCHEMES)
def test_a_kernel_stays_inside_its_tensors(name: str, kernel: str) -> None:
    """Each kernel, `merge` with the two that attend."""
    kernels = build(SCHEMES[name], Shape(32, 1, 3, softcap=False), "triton")
    for method, *arguments in _calls(SCHEMES[name], kernels, kernel, tokens=37):
        assert outcome(partial(run_fenced, kernels, method, *arguments)) == SOUND


def test_a_fence_stands_at_both_ends() -> None:
    import ctypes

    x = fenced(torch.arange(5, dtype=torch.int32))
    assert x.tolist() == [0, 1, 2, 3, 4]
    end = x.data_ptr() + 20
    assert outcome(lambda: ctypes.string_at(end - 1, 1)) == SOUND
    assert outcome(lambda: ctypes.string_at(end, 1)) == FENCE
    assert outcome(lambda: ctypes.string_at(end - 4097, 1)) == FENCE


def test_a_kernel_without_one_mask_dies_at_the_fence(tmp_path: Path) -> None:
    kernels = build(token4, Shape(32, 1, 3), "triton")
    mask = ", mask=live[None, :], other=0.0"
    before, after = kernels.source.split("\ndef scores(")
    assert after.split("\ndef ")[0].count(mask) == 2
    broken = f"{before}\ndef scores({after.replace(mask, '', 1)}"
    path = tmp_path / "broken.py"
    path.write_text(broken, encoding="utf-8")
    spoilt = replace(kernels, path=path, source=broken, module=bind(kernels.plan, "triton", path, broken))
    method, *arguments = _calls(token4, kernels, "scores", tokens=37)[0]  # one query: the last row is the tensor's end
    assert outcome(lambda: run_fenced(kernels, method, *arguments)) == SOUND
    assert outcome(lambda: run_fenced(spoilt, method, *arguments)) == FENCE
