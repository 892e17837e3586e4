"""Attention that tokens receive, worked by hand or two ways, for either backend."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvdsl.codegen import build
from kvdsl.errors import BackendError
from kvdsl.kernels import AttentionState, Backend
from kvdsl.scheme import Recent, Scheme, Sinks
from kvdsl.schemes import ALL
from kvdsl.shape import Shape
from kvdsl.testing import Case
from kvdsl.testing.attention import Step, attend, score_errors
from kvdsl.testing.driving import attention_state, device_of, ready
from kvdsl.testing.received import probes_of, received

SHORT = ALL["kivi2"].with_(recent=Recent(32), sinks=Sinks(3))
SMALL = {"short": SHORT, "token4": ALL["token4"], "fp16": ALL["fp16"]}


def uniform_attention(scheme: Scheme, backend: Backend) -> None:
    """P22: queries of zeros spread attention evenly, so that token i of 100 receives the sum of 1 / (k + 1) over the
    rows k from i on: 5.187 the first, .01 the last; over how many rows see them .05187, .01376 (i = 50) and .01."""
    kernels, tokens = build(scheme, Shape(32, 1, 2), backend), 100
    k, v = (torch.randn(1, 1, tokens, 32, generator=torch.Generator().manual_seed(i)).half() for i in range(2))
    device = device_of(kernels)
    state, params = attention_state(kernels, k, v, [tokens], [tokens]), ready(kernels, None)
    q = torch.zeros(1, 2, tokens, 32, dtype=torch.float16, device=device)
    position = torch.arange(tokens, dtype=torch.int32, device=device)[None]
    lse = kernels.reach(q, position, state, params)
    assert torch.allclose(lse.cpu(), torch.arange(1, tokens + 1).log().float(), atol=1e-6)
    first, second = (x.cpu()[0, 0].double() / 2 for x in kernels.received(q, position, lse, state, params))
    parts = 1 / torch.arange(1, tokens + 1, dtype=torch.float64)
    assert torch.allclose(first, parts.flip(0).cumsum(0).flip(0), rtol=1e-5)
    assert torch.allclose(second, parts.square().flip(0).cumsum(0).flip(0), rtol=1e-5)
    assert first[[0, 99]].tolist() == pytest.approx([5.187, 0.01], abs=5e-4)
    spread = first / torch.arange(tokens, 0, -1)
    assert spread[[0, 50, 99]].tolist() == pytest.approx([0.05187, 0.01376, 0.01], abs=5e-6)


def sums_over_parts_of_the_rows(scheme: Scheme, backend: Backend) -> None:
    """Rows in another order, and in two calls, add up to the same."""
    case = Case(scheme, Shape(32, 2, 4), backend, batch=2, tokens=109, seed=5)
    step, position = _probes(case)
    lse, *whole = received(case, step, position)
    order = torch.randperm(position.shape[1], generator=torch.Generator().manual_seed(0))
    parts = [received(case, replace(step, q=step.q[:, :, at].contiguous()), position[:, at]) for at in order.chunk(2)]
    for got, want in zip((sum(sums) for sums in zip(*(part[1:] for part in parts), strict=True)), whole, strict=True):
        assert isinstance(got, Tensor) and torch.allclose(got, want, rtol=1e-4, atol=1e-7)
    assert torch.allclose(torch.cat([part[0] for part in parts], 2), lse[:, :, order], atol=1e-5)


def rows_are_left_out(scheme: Scheme, backend: Backend) -> None:
    """A row whose log-sum-exp is -inf gives nothing, as one that stands nowhere; one that stands behind the last token
    stands at it."""
    case = Case(scheme, Shape(32, 1, 2), backend, batch=2, tokens=109, seed=8)
    step, position = _probes(case)
    lse, *_ = received(case, step, position)
    nowhere, behind = position.clone(), position.clone()
    nowhere[:, 0], behind[:, 0] = -1, 1 << 20
    lost = lse.clone()
    lost[:, :, 0] = -math.inf
    for got, want in zip(received(case, step, position, lost)[1:], received(case, step, nowhere)[1:], strict=True):
        assert torch.equal(got, want)
    for got, want in zip(received(case, step, behind), received(case, step, position), strict=True):
        assert torch.equal(got, want)


def two_segments_are_one(scheme: Scheme, backend: Backend) -> None:
    """Under the log-sum-exps of both, what tokens receive in either segment is what they receive in the whole."""
    case = Case(scheme, Shape(32, 1, 2), backend, batch=2, tokens=109, seed=6)
    step, position = _probes(case)
    whole = received(case, step, position)
    late = replace(step, options={**step.options, "start": [70, 70]})
    lse, first, second = received(case, late, position, whole[0])
    assert torch.allclose(first[:, :, 70:], whole[1][:, :, 70:], rtol=1e-5)
    assert torch.allclose(second[:, :, 70:], whole[2][:, :, 70:], rtol=1e-5)
    assert not first[:, :, :70].any() and not second[:, :, :70].any()
    early = torch.minimum(position, torch.tensor(69))
    parts = received(case, step, early)[0], received(case, late, position)[0]
    both = torch.logaddexp(*parts)
    there = ~whole[0].isinf()
    assert torch.allclose(both[there], whole[0][there], atol=1e-4) and bool((both[~there] == -math.inf).all())


def sums_of_attention_are_taken(scheme: Scheme, backend: Backend) -> None:
    """The log-sum-exps of `attend` do as well: tokens receive what their rows give, as far as scores are off."""
    case = Case(scheme, Shape(32, 2, 4), backend, tokens=109, seed=7)
    step = replace(_probes(case)[0], q=case.query(4))
    position = torch.arange(case.tokens - 4, case.tokens)[None]
    _, lse = attend(case, step)
    _, first, _ = received(case, step, position, lse)
    assert torch.allclose(lse, received(case, step, position)[0], atol=2 * float(score_errors(case, step).max()))
    assert torch.allclose(first.sum(-1), torch.tensor(8.0), rtol=2 * float(score_errors(case, step).max()))


def nobody_gives_nothing(backend: Backend) -> None:
    """Rows that stand nowhere, no rows, no tokens, no sequences."""
    kernels = build(SHORT, Shape(32, 1, 2), backend)
    device, params = device_of(kernels), ready(kernels, None)
    for batch, tokens, rows in ((2, 40, 3), (2, 40, 0), (0, 0, 2), (1, 0, 2)):
        x = torch.randn(max(batch, 1), 1, max(tokens, 1), 32).half()
        state = attention_state(kernels, x, x, [tokens] * max(batch, 1), [tokens] * max(batch, 1))
        state = _first_sequences(state, batch)
        q = torch.randn(batch, 2, rows, 32, device=device).half()
        position = torch.full((batch, rows), -1, dtype=torch.int32, device=device)
        lse = kernels.reach(q, position, state, params)
        assert lse.shape == (batch, 2, rows) and bool((lse == -math.inf).all())
        for sums in kernels.received(q, position, lse, state, params):
            assert sums.shape == (batch, 1, state.longest) and not sums.any()


def windows_are_refused(backend: Backend) -> None:
    kernels = build(SHORT, Shape(32, 1, 2), backend)
    x = torch.zeros(1, 1, 40, 32).half()
    state, params = attention_state(kernels, x, x, [40], [40], window=7), ready(kernels, None)
    q = torch.zeros(1, 2, 1, 32).half()
    position = torch.zeros(1, 1, dtype=torch.int32)
    for call in (
        lambda: kernels.reach(q, position, state, params),
        lambda: kernels.received(q, position, torch.zeros(1, 2, 1), state, params),
    ):
        with pytest.raises(BackendError, match="state.window: attention within the newest 7 tokens"):
            call()


def _probes(case: Case) -> tuple[Step, Tensor]:
    """Five probes, of which one stands nowhere, in sequences that are packed as usual."""
    step, _ = probes_of(case, start=False)
    usual = tuple(n if case.scheme.prefill == "stored" else n - 1 for n in step.lengths)
    rows = torch.stack([torch.tensor([n - 1, 0, n // 2, -1, n - 2]) for n in step.lengths])
    return replace(step, q=case.query(5), seen=usual), rows


def _first_sequences(state: AttentionState, batch: int) -> AttentionState:
    """The state of the first so many sequences."""
    names = ("table", "packed_keys", "packed_values", "length", "key_rows", "value_rows", "first", "start")
    return replace(state, **{name: getattr(state, name)[:batch] for name in names})
