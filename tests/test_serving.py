"""What a request gets does not depend on chunks, neighbours, where its blocks stand, or what was there before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import serving
import torch
from serving_cases import Engine, Request

from kvdsl.errors import CacheError, SchemeError
from kvdsl.registry import load
from kvdsl.scheme import Recent
from kvdsl.serving import Slots, served


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


@pytest.mark.parametrize("name", ["token4", "kivi4"])
def test_blocks_of_another_request_say_the_same(name: str) -> None:
    """A prefix ends on a border of blocks, where all is packed; both requests then fill blocks of their own."""
    engine = Engine(name)
    first = Request(1)
    engine.step([first], [3 * engine.how.block + 9])
    shared = 2 * engine.how.block
    other = Request(1, shared, first.blocks[:2])
    found = torch.cat([engine.step([other, first], [100, 1])[0], engine.step([first, other], [1, 30])[1]])
    near(found, engine.alone(other, other.length)[shared:])


@pytest.mark.parametrize("name", ["token4", "kivi4"])
def test_rejected_drafts_leave_no_trace(name: str) -> None:
    """Also where a draft has filled a block, and begun the next."""
    engine = Engine(name, draft=4)
    request, beside = Request(1), Request(2)
    got = [engine.step([request, beside], [engine.how.block - 2, 5])[0]]
    for wrong in (4, 3, 1, 4, 2):
        got.append(engine.step([request, beside], [5, 5], wrong=wrong)[0][: 5 - wrong])
    near(torch.cat(got), engine.alone(request, request.length))


def test_a_slot_is_found_by_its_block_and_taken_when_it_is_the_oldest() -> None:
    slots = Slots(2)
    one, other = slots.take(None, set()), slots.take(None, set())
    slots.keep(one, (7,))
    slots.keep(other, (8,))
    assert slots.take(7, set()) == one and slots.take(8, {one}) == other
    slots.keep(one, (9,))  # now the other is the one that was used longest ago
    assert slots.take(None, {one}) == other
    with pytest.raises(CacheError, match="block 8: the exact rows of its request are gone"):
        slots.take(8, set())
    slots.keep(other, (10,))
    with pytest.raises(CacheError, match="all 2 are in use"):
        slots.take(None, {one, other})


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("zipcache", "tiers"),
        ("kvquant3", "keys.transform"),
        ("skvq2", "layers"),
        ("mla_fp8", "values.code"),
        ("gear2", None),
    ],
)
def test_what_an_engine_cannot_serve_is_told_by_its_field(name: str, field: str | None) -> None:
    scheme = load(name)
    if field == "layers":
        scheme = scheme.with_(layers={0: load("fp16")})
    if field is None:
        assert served(scheme).waits
        return
    with pytest.raises(SchemeError, match=rf"\b{field}"):
        served(scheme)


def test_a_window_is_served_as_the_open_block() -> None:
    how = served(load("kivi4"))
    assert (how.block, how.page_tokens, how.scheme.recent) == (128, 64, Recent(128, flush="whole"))
    assert not served(load("token4")).waits and not served(load("kivi2_sinks")).shares
    with pytest.raises(SchemeError, match="use 1024 or fewer"):
        served(load("kivi4").with_(recent=Recent(1056)))


def test_the_page_s_table_is_the_measured_one() -> None:
    root = Path(__file__).resolve().parent.parent
    found = json.loads((root / "benchmarks/results/serving/cpu.json").read_text())
    assert serving.table(found) in (root / "docs/serving.md").read_text()
