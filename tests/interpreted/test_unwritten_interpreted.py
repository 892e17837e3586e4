"""What the host looks at on the way to a page is there, also of a ragged batch, of which kernels make what there is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from walked import walked

from kvdsl.codegen import run_pages
from kvdsl.shape import Shape

UNWRITTEN = 255  # what a byte of memory holds that nobody has written, of which no code of four bits is one


@pytest.fixture
def filled() -> Iterator[None]:
    """Memory that nobody has written holds NaN, and UNWRITTEN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize(
    ("name", "looks", "tokens"),
    [("polar", "polar", 40), ("kvarn_even", "balanced", 290), ("kitty", "rows_there", 290), ("kvquant3", "split", 100)],
)
def test_the_host_looks_at_what_kernels_have_written(
    name: str, looks: str, tokens: int, filled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = getattr(run_pages, looks), list[torch.Tensor]()

    def watched(*given: Any) -> Any:
        seen.extend(each for each in given if isinstance(each, torch.Tensor))
        return real(*given)

    monkeypatch.setattr(run_pages, looks, watched)
    walked(name, Shape(64, 1, 1), "cpu", chunks=(tokens,), steps=0)
    assert seen
    assert all(bool(torch.isfinite(x).all() if x.is_floating_point() else (x != UNWRITTEN).all()) for x in seen)
