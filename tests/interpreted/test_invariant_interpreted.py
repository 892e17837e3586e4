"""`batch_invariant=True` through the Triton kernels, interpreted."""

from __future__ import annotations

import pytest
import torch
from invariance_cases import SCHEMES, alone_and_together


@pytest.mark.parametrize("name", SCHEMES)
def test_neighbours_change_no_bit(name: str) -> None:
    for alone, together in alone_and_together(name, "triton"):
        assert torch.equal(alone, together)
