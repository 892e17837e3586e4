"""`batch_invariant=True` through the Triton kernels, interpreted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from invariance_cases import SCHEMES, alone_and_together

from kvdsl.codegen import build
from kvdsl.codegen.run_triton import TritonModule
from kvdsl.quantized_cache import QuantizedCache
from kvdsl.schemes import token4
from kvdsl.shape import Shape


@pytest.mark.parametrize("name", SCHEMES)
def test_neighbours_change_no_bit(name: str) -> None:
    for alone, together in alone_and_together(name, "triton"):
        assert torch.equal(alone, together)


def test_how_sums_are_shared_does_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the order of a merge's sums depends on how many channels a program has: of a fixed plan all, always."""
    given: list[tuple[int, ...]] = []
    run = TritonModule._run

    def recorded(self: TritonModule, kernel: str, grid: tuple[int, ...], *args: Any) -> None:
        given.extend([grid[2:]] * (kernel == "merge"))
        run(self, kernel, grid, *args)

    monkeypatch.setattr(TritonModule, "processors", lambda self: 132)
    monkeypatch.setattr(TritonModule, "_run", recorded)
    for _ in alone_and_together("token4", "triton"):
        pass
    assert set(given) == {(1,)}
    query, cache = torch.ones(1, 4, 1, 64).half(), QuantizedCache(build(token4, Shape(64, 2, 4), "triton"), 1)
    cache.append_and_attend(query, query[:, :2], query[:, :2])
    assert given[-1] == (2,)
