"""What a request gets does not depend on chunks, on who is beside it, on where its blocks stand, or on what was there."""

from __future__ import annotations

import pytest
import torch
from serving_cases import Engine, Request

from kvdsl.errors import CacheError, SchemeError
from kvdsl.registry import load
from kvdsl.scheme import Recent
from kvdsl.serving import Slots, served

NAMES = ["token4", "kivi2", "kivi4", "kivi2_sinks", "qjl_kv", "turboquant3", "skvq2"]


def near(found: torch.Tensor, right: torch.Tensor) -> None:
    torch.testing.assert_close(found, right, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["token4", "kivi2", "kivi4", "kivi2_sinks", "turboquant3", "qjl_gauss"])
def test_a_request_gets_what_it_gets_alone(name: str) -> None:
    """Ragged chunks, decoding beside prompts, borders of blocks within chunks."""
    engine = Engine(name)
    first, other, late = Request(1), Request(2), Request(3)
    got: dict[int, list[torch.Tensor]] = {1: [], 2: [], 3: []}
    for together, counts in (
        ([first, other], [150, 7]),
        ([other, first], [130, 1]),
        ([first, other, late], [1, 1, 300]),
        ([late, first], [2, 1]),
        ([first, late, other], [100, 1, 1]),
    ):
        for request, out in zip(together, engine.step(together, counts), strict=True):
            got[request.seed].append(out)
    for request in (first, other, late):
        near(torch.cat(got[request.seed]), engine.alone(request, request.length))
