"""Decode under schedules that timing found: from timing to launch, with a clock that is told what to say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from invariance_cases import alone_and_together
from tune_cases import CARD, ListedClock

import kvdsl
from kvdsl import codegen
from kvdsl.codegen import schedules
from kvdsl.codegen.run_kernels import KernelModule
from kvdsl.codegen.schedules import Bucket, Schedule
from kvdsl.kernels import KernelSet, Segment, attend_segments
from kvdsl.quantized_cache import QuantizedCache
from kvdsl.schemes import ALL
from kvdsl.shape import Shape

SHAPE = Shape(64, 2, 4)
TOKENS = 300
Asked = list[tuple[int | None, int, int]]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("KVDSL_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(schedules, "this_card", lambda: CARD)
    codegen._build.cache_clear()
    yield
    codegen._build.cache_clear()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """How every decode is launched: depth, programs that share a sequence's pages, times the usual warps."""
    found: Asked = []
    launch = KernelModule._run

    def run(
        self: Any, kernel: str, grid: Any, given: Any, pool: Any, params: Any, depth: Any = None, times: int = 1,
        **more: Any,
    ) -> None:  # fmt: skip
        if kernel == "decode":
            found.append((depth, given["splits"], times))
        launch(self, kernel, grid, given, pool, params, depth, times, **more)

    monkeypatch.setattr(KernelModule, "_run", run)
    return found


def filled(kernels: KernelSet, batch: int = 2, **options: Any) -> tuple[QuantizedCache, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    k, v = (torch.randn(batch, 2, TOKENS, 64, generator=generator).half() for _ in range(2))
    cache = QuantizedCache(kernels, batch, device="cpu", capacity=512, **options)
    cache.append(k, v)
    return cache, torch.randn(batch, 4, 1, 64, generator=generator).half()


@pytest.mark.parametrize("name", ["token4", "kivi2"])
def test_the_fastest_is_launched_and_attends_to_the_same(name: str, asked: Asked) -> None:
    scheme = ALL[name]
    kernels = codegen.build(scheme, SHAPE, "triton")
    cache, query = filled(kernels)
    by_model = cache.attend(query, cache.state())
    found = kvdsl.tune(scheme, SHAPE, batch=2, tokens=TOKENS, clock=ListedClock([5, 4, 6, 3, 5, *[5] * 9]), card=CARD)
    assert found.best == list(found.seconds)[3] != found.model and found.bucket == (2, 256)
    asked.clear()
    here = cache.attend(query, cache.state())  # this process has the kernels already
    codegen._build.cache_clear()
    again = codegen.build(scheme, SHAPE, "triton")
    assert again is not kernels and again.schedule == kernels.schedule == f"tuned on {CARD}"
    cache, query = filled(again)
    there = cache.attend(query, cache.state())
    assert asked == [(found.best.stages, found.best.splits, found.best.warps)] * 2
    for one, two, right in zip(here, there, by_model, strict=True):
        assert torch.equal(one, two) and torch.allclose(one.float(), right.float(), atol=2e-3)


def everywhere(kernels: KernelSet, schedule: Schedule) -> None:
    """Tuned for calls of every size."""
    for batch in (1, 2, 4):
        for tokens in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512):
            kernels.module.schedules.best[Bucket(batch, tokens)] = schedule  # type: ignore[attr-defined]


def test_other_calls_are_the_models(asked: Asked) -> None:
    """Of another size, under a window, with splits that are given, among segments, of more queries."""
    kernels = codegen.build(ALL["token4"], SHAPE, "triton")
    cache, query = filled(kernels)
    state, tuned = cache.state(), Schedule(3, 2, 2)
    everywhere(kernels, tuned)
    kernels.attend(query, state, cache.params)
    assert asked == [(2, 3, 2)]
    asked.clear()
    kernels.attend(query, replace(state, window=100), cache.params)
    kernels.attend(query, state, cache.params, splits=4)
    attend_segments(query, [Segment(kernels, state, cache.params)] * 2)
    kernels.attend(query.expand(-1, -1, 9, -1), state, cache.params, form="extend")
    kernels.module.schedules.best.pop(Bucket(2, 256))  # type: ignore[attr-defined]
    kernels.attend(query, state, cache.params)
    assert [depth for depth, *_ in asked] == [None] * 5 and {(splits, times) for _, splits, times in asked} == {
        (2, 1),
        (4, 1),
    }


def test_heads_of_a_group_may_need_several_programs(asked: Asked) -> None:
    """One query of 40 heads has more rows than a program: that was timed, more queries were not."""
    kernels = codegen.build(ALL["token4"], Shape(64, 1, 40), "triton")
    everywhere(kernels, Schedule(3, 2, 2))
    cache = QuantizedCache(kernels, 1, device="cpu", capacity=512)
    k, v = (torch.randn(1, 1, TOKENS, 64).half() for _ in range(2))
    cache.append(k, v)
    query = torch.randn(1, 40, 1, 64).half()
    for queries in (1, 2):
        kernels.attend(query.expand(-1, -1, queries, -1), cache.state(), cache.params, form="decode")
    assert [depth for depth, *_ in asked] == [2, None]


def test_a_sequence_has_no_more_programs_than_pages(asked: Asked) -> None:
    kernels = codegen.build(ALL["token4"], SHAPE, "triton")
    cache, query = filled(kernels)
    everywhere(kernels, Schedule(128, 3, 1))
    cache.attend(query, cache.state())
    assert asked == [(3, 5, 1)]


def test_neighbours_change_no_bit_whatever_is_tuned(asked: Asked) -> None:
    """`batch_invariant=True` knows no buckets."""
    kernels = codegen.build(ALL["token4"], SHAPE, "triton")
    everywhere(kernels, Schedule(3, 2, 2))
    for alone, together in alone_and_together("token4", "triton"):
        assert torch.equal(alone, together)
    assert asked and {depth for depth, *_ in asked} == {None}
