"""`batch_invariant=True` through the Triton kernels, interpreted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from invariance_cases import SCHEMES, alone_and_together

from kvdsl.codegen import build
from kvdsl.codegen.run_triton import TritonModule
from kvdsl.quantized_cache import QuantizedCache
from kvdsl.schemes import ALL
from kvdsl.shape import Shape


@pytest.mark.parametrize("name", SCHEMES)
def test_neighbours_change_no_bit(name: str) -> None:
    for alone, together in alone_and_together(name, "triton"):
        assert torch.equal(alone, together)


@pytest.mark.parametrize(
    ("name", "processors", "fixed", "free"),
    [("token4", 132, (1, 1, 1), (2, 1, 1)), ("turboquant4", 1, (2, 1, 4), (2, 16, 2))],
)
def test_how_sums_are_shared_does_not_depend_on_the_batch(
    name: str, processors: int, fixed: tuple[int, ...], free: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the order of a merge's sums depends on how many channels, rows and warps a program has: of a fixed plan
    always as many.  A GPU of so few processors would have other ones."""
    seen: list[tuple[int, ...]] = []
    run = TritonModule._run

    def recorded(
        self: TritonModule, kernel: str, grid: tuple[int, ...], given: dict[str, Any], *args: Any, **more: Any
    ) -> None:
        seen.extend([(grid[-1], given.get("MERGED", 1), more.get("times", 1))] * (kernel == "merge"))
        run(self, kernel, grid, given, *args, **more)

    monkeypatch.setattr(TritonModule, "processors", lambda self: processors)
    monkeypatch.setattr(TritonModule, "_run", recorded)
    for _ in alone_and_together(name, "triton"):
        pass
    assert set(seen) == {fixed}
    query, cache = torch.ones(2, 4, 1, 64).half(), QuantizedCache(build(ALL[name], Shape(64, 2, 4), "triton"), 2)
    cache.append_and_attend(query, query[:, :2], query[:, :2])
    assert seen[-1] == free
