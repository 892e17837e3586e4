"""How the pages of a sequence are shared among programs, in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvdsl.bench import Size, numbers
from kvdsl.bench_cache import FilledPages, filled
from kvdsl.codegen import build
from kvdsl.exact import relative_error
from kvdsl.schemes import ALL


def cached(name: str, tokens: int) -> tuple[Any, FilledPages, torch.Tensor]:
    """The module, two ragged sequences, a query of each."""
    size = Size(2, 1, tokens, 2, 64)
    normal = numbers(size, torch.device("cpu"))
    kernels: Any = build(ALL[name], size.shape, "triton")
    full = filled(kernels, 2, tokens, normal)
    assert isinstance(full, FilledPages)
    return kernels.module, full, normal(size.q_heads, 1)


@pytest.mark.parametrize("name", ["token4", "token3", "kvtq", "quarot4"])
def test_a_page_that_is_asked_for_early_is_the_same(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """To the last bit: programs of twice the warps ask for it, which interpreted ones have not."""
    module, full, query = cached(name, 200)
    before = full.attend(query)
    monkeypatch.setattr(module, "_times", lambda part: 2)
    assert torch.equal(full.attend(query), before)
    assert ("decode", None, 2) in module.settings


@pytest.mark.parametrize("programs", [1, 2, 3, 5, 9])
def test_programs_share_the_tiles_of_pages(monkeypatch: pytest.MonkeyPatch, programs: int) -> None:
    """Pages of two tiles: each tile is read once, whichever number of programs shares them."""
    module, full, query = cached("exl3_3", 500)
    assert module.plan.layout.page_tokens == 2 * module.plan.tile
    before = full.attend(query)
    monkeypatch.setattr(module, "_clean_splits", lambda part: programs)
    found = full.attend(query)
    assert relative_error(found, before.double()) < 2e-3
