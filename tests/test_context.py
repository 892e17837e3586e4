"""One context over several ranks: what it holds and gives is what one process alone holds and gives."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import context_cases as cases
import pytest
import torch
import torch.distributed as dist
from context_cases import PLANS, SHAPE, Ranks, Step, driven, fresh, plan_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from kvdsl.context import ContextCache
from kvdsl.context_rules import faults
from kvdsl.errors import CacheError, SchemeError, ShapeError
from kvdsl.exchange import step_bytes
from kvdsl.schemes import ALL
from kvdsl.spread import Spread, Stretch

pytestmark = pytest.mark.usefixtures("one_thread")
EXACT = ("kivi2", "qjl", "turboquant3", "stored", "kvquant3")
"""Schemes of which one process and several differ by no more than 1e-6; products of the others round more."""
OTHERS = ("token4", "int8_token_head", "quarot4", "gear2", "windows")
NAMES = {2: EXACT + OTHERS, 4: ("kivi2", "stored", "windows", "gear2")}
TOKENS = 32768
EACH = [(ranks, name, plan) for ranks, names in NAMES.items() for name in names for plan in PLANS]
NEAR = 1e-6


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What every rank of a group of so many processes found; a group is started once."""

    @cache
    def found(ranks: int) -> list[Any]:
        folder: Path = tmp_path_factory.mktemp(f"ranks{ranks}")
        return cases.run(ranks, cases.all_of, folder, NAMES[ranks], TOKENS)

    return found


@cache
def alone(name: str, plan: str) -> tuple[list[tuple[Tensor, Tensor]], dict[str, Any], float]:
    """One process: what attention gives, what is held, and how far outputs are from float64."""
    one, error = fresh(name, PLANS[plan]), 0.0
    attended: list[tuple[Tensor, Tensor]] = []
    exact = cases.scheme_of(name).prefill == "exact"
    for step, query, keys, values in cases.steps(SHAPE, PLANS[plan], plan_of(plan)):
        before = cases.held(one)
        attended += driven(one, PLANS[plan], [step], at=len(attended))
        now = cases.held(one)
        for b, out in enumerate(attended[-1][0]):
            stored = [now[side][b] for side in ("keys", "values")]
            if step.tokens and exact:
                fresh_ones = (x[b, :, step.tokens - (step.counts or (step.tokens,) * 9)[b] :] for x in (keys, values))
                stored = [
                    torch.cat([before[side][b], x], 1) for side, x in zip(("keys", "values"), fresh_ones, strict=True)
                ]
            error = max(error, float((out - _exact(query[b], *stored)).abs().max()))
    return attended, cases.held(one), error


def _exact(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention in float64 of query (Hq, Q, D), of which the last stands at the last of the tokens (H, T, D)."""
    keys, values = (x.double().repeat_interleave(SHAPE.group, 0) for x in (keys, values))
    scores, tokens, queries = query.double() @ keys.mT * SHAPE.head_dim**-0.5, keys.shape[1], query.shape[1]
    seen = torch.arange(tokens) <= tokens - queries + torch.arange(queries)[:, None]
    return scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num() @ values


def near(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], more: float = 0.0) -> None:
    """Outputs within NEAR, or what the kernels' own rounding adds; log-sum-exps within four roundings of theirs."""
    there = want[1].isfinite()
    assert torch.equal(got[1].isfinite(), there) and not got[0][~there].any()
    assert float((got[0] - want[0]).abs().max()) <= NEAR + more
    assert torch.allclose(got[1][there], want[1][there], rtol=4 * 2.0**-23, atol=4 * 2.0**-23)


# -- several processes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "name", "plan"), EACH)
def test_attention_of_several_processes_is_that_of_one(groups: Any, ranks: int, name: str, plan: str) -> None:
    """Where a scheme's own products are further from float64, so may be sums in another order, on either side."""
    want, _, error = alone(name, plan)
    every = [rank[f"{name} {plan}"]["attended"] for rank in groups(ranks)]
    for number, one in enumerate(want):
        near(every[0][number], one, 2 * error if name in OTHERS else 0.0)
        for rank in every[1:]:
            assert all(map(torch.equal, rank[number], every[0][number])), "ranks differ"


@pytest.mark.parametrize(("ranks", "name", "plan"), EACH)
def test_every_rank_holds_its_part_of_one_cache_to_the_byte(groups: Any, ranks: int, name: str, plan: str) -> None:
    _, want, _ = alone(name, plan)
    found = [rank[f"{name} {plan}"] for rank in groups(ranks)]
    scheme = cases.scheme_of(name)
    sinks = scheme.sinks.tokens if scheme.sinks else 0
    size, pages = fresh(name, 1).kernels.page_tokens, 0
    for b in range(PLANS[plan]):
        length = found[0]["lengths"][b]
        assert sum(one["own"][b] for one in found) == length == want["keys"][b].shape[1]
        spread = Spread(ranks, size, sinks, length, 0, tuple(Stretch(*x) for x in found[0]["spreads"][b]))
        for rank, one in enumerate(found):
            mine = [t for begin, end in spread.runs(rank, 0) for t in range(begin, end)]
            for number, side in enumerate(("keys", "values")):
                assert torch.equal(one["held"][side][b], want[side][b][:, mine])
                packed = sum(t - sinks < want["packed"][b][number] for t in mine if t >= sinks)
                assert one["held"]["packed"][b][number] == packed
            mine = [t - sinks for t in mine if t >= sinks]
            for place in range(min(one["held"]["packed"][b]) // size):
                page = one["held"]["pages"][b][place]
                assert torch.equal(page, want["pages"][b][mine[place * size] // size])
                pages += 1
    assert pages > 2 * (plan == "even")


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_long_prompt_is_shared_evenly(groups: Any, ranks: int) -> None:
    want = cases.one_long(TOKENS)
    found = [rank["long"] for rank in groups(ranks)]
    for one in found:
        for got, right in zip(one["attended"], want, strict=True):
            near(got, right)
    own = [one["own"][0] for one in found]
    assert sum(own) == TOKENS + 3 and max(own) - min(own) <= 64
    assert max(one["stats"]["bytes"] for one in found) < 8.6 / 8 * 2 * 64 * (TOKENS / ranks + 128) + 65536


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_step_sends_what_the_model_says_whatever_the_context(groups: Any, ranks: int) -> None:
    """By the process's own count of written bytes, whose messages have headers, as many as there are messages."""
    for rank in groups(ranks):
        found, headers = rank["exchange"], set()
        for (_, queries, checked), (model, counted, written) in found.items():
            words = 4 * (2 * 4 * queries * 65 + (5 if checked else 0))
            assert counted == model == (ranks - 1) * words == found[100, queries, checked][1]
            assert written == found[100, queries, checked][2], "more bytes for a longer context"
            headers.add((checked, written - model))
        assert len(headers) == 2 and all(0 < more < 1000 * (ranks - 1) for _, more in headers)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_refuse_alike_and_go_on(groups: Any, ranks: int) -> None:
    for rank, one in enumerate(groups(ranks)):
        said = one["refused"]
        theirs = "ShapeError: {}: rank 1 was given something else than rank 0"
        for name, call in {
            "turn": "ContextCache",
            "scheme": "ContextCache",
            "counts": "append",
            "queries": "attend",
        }.items():
            assert said[name].startswith(theirs.format(call)), said[name]
        assert "was given something else" in said["call"]
        if rank == 0:
            assert said["window"].startswith("CacheError: ContextCache: rank 1 refuses it")
            assert said["dtype"].startswith("CacheError: append_and_attend: rank 1 refuses it, so no rank does it")
            assert said["failure"].startswith("CacheError: attention: ranks [1] failed, so the step is undone")
        else:
            assert said["window"].startswith("CacheError: window: a layer that sees 9 tokens holds no more")
            assert said["dtype"].startswith("ShapeError: keys: torch.float16 is not the kernels' torch.float32")
        if rank == 1:
            assert said["failure"] == "MemoryError: no memory"
        assert said["full"].startswith("CacheError: capacity: rank 0 would hold")
        assert said["unchanged"] == "True" and said["after"] == "done"


# -- one process that plays all ranks --------------------------------------------------------------------------------


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_steps_over_any_number_of_ranks_are_those_of_one(monkeypatch: pytest.MonkeyPatch, data: Any) -> None:
    name = data.draw(st.sampled_from(("stored", "windows", "kivi2")))
    batch, ranks = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    plan = []
    for _ in range(data.draw(st.integers(1, 5))):
        tokens = data.draw(st.one_of(st.just(1), st.integers(1, 40), st.integers(100, 500)))
        counts = None if data.draw(st.booleans()) else tuple(data.draw(st.integers(0, tokens)) for _ in range(batch))
        plan.append(Step(tokens, data.draw(st.integers(1, tokens)), counts))
    made = Ranks(ranks, lambda: fresh(name, batch), monkeypatch)
    want = driven(fresh(name, batch), batch, plan)
    for got, one in zip(driven(made, batch, plan), want, strict=True):
        near(got, one, 4e-6 if name == "windows" else 0.0)


SPREAD = [name for name, scheme in ALL.items() if not faults(scheme, placed=True)]
WIDE = {"bitdecoding4", "bitdecoding2"}
"""Of which one scale is of 128 channels."""
BALANCED = {"smoothquant8"}
"""Which is calibrated on queries, too."""


@pytest.mark.parametrize("name", [name for name in SPREAD if name not in WIDE | BALANCED])
def test_every_shipped_scheme_that_can_be_spread_gives_what_one_cache_gives(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs are below 1/2; products of coded numbers, of values far above those, round by up to 2e-5."""
    plan = [Step(321, 16, (321, 37)), Step(1, 1), Step(70, 9, (70, 11)), Step(0, 3)]
    shape = replace(SHAPE, placed=cases.scheme_of(name).keys.rope is not None)
    made = Ranks(3, lambda: fresh(name, 2, shape), monkeypatch)
    for got, want in zip(driven(made, 2, plan), driven(fresh(name, 2), 2, plan), strict=True):
        near(got, want, 4e-5)


@settings(max_examples=60)
@given(st.integers(1, 5), st.integers(0, 5), st.lists(st.integers(0, 700), max_size=12))
def test_every_token_is_on_one_rank_and_stretches_begin_pages(ranks: int, sinks: int, counts: list[int]) -> None:
    spread = Spread(ranks, 64, sinks)
    for count in counts:
        spread = spread.grown(count)
    runs = {rank: spread.runs(rank, 0) for rank in range(ranks)}
    tokens = sorted(t for mine in runs.values() for begin, end in mine for t in range(begin, end))
    assert tokens == list(range(sum(counts)))
    for rank, mine in runs.items():
        assert all(begin == 0 or (begin - sinks) % 64 == 0 for begin, _ in mine)
        own = [t for begin, end in mine for t in range(begin, end)]
        for at in {0, 1, sinks, 64, len(tokens) // 2, len(tokens)}:
            assert spread.held(rank, at) == sum(t < at for t in own)
        for queries in (1, 3, 100):
            for piece in spread.pieces(rank, queries):
                for i in range(piece.first, piece.last):
                    sees = sum(t <= len(tokens) - queries + i for t in own)
                    assert sees == piece.seen - max(0, piece.last - 1 - i - piece.behind), (piece, i)


def test_every_rank_takes_a_stretch_of_a_prompt_and_then_turns() -> None:
    spread = Spread(4, 64, 4).grown(1000)
    assert [spread.runs(rank, 0) for rank in range(4)] == [[(0, 260)], [(260, 516)], [(516, 772)], [(772, 1000)]]
    for _ in range(100):
        spread = spread.grown(1)
    assert spread.runs(3, 900) == [(900, 1028)] and spread.runs(0, 900) == [(1028, 1092)]
    assert spread.runs(1, 900) == [(1092, 1100)]


# -- a group of one --------------------------------------------------------------------------------------------------


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_one_rank_is_the_cache_itself_and_sends_nothing() -> None:
    made = ContextCache(fresh("kivi2", 2))
    for got, want in zip(driven(made, 2, cases.RAGGED), alone("kivi2", "ragged")[0], strict=True):
        near(got, want)
    assert made.stats()["sent"] == made.stats()["step"] == 0 and made.own == made.lengths
    assert made.nbytes == made.cache.nbytes
    made.reset()
    assert made.lengths == (0, 0)


@pytest.mark.usefixtures("group")
def test_a_rank_may_be_given_its_own_tokens_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parted = (Ranks(3, lambda: fresh("windows", 2), monkeypatch) for _ in range(2))
    keys, values = (cases.numbers(2, 2, 400, 64, seed) for seed in (1, 2))
    for one, other in zip(whole.every, parted.every, strict=True):
        one.append(keys, values, counts=(400, 150))
        mine = other.share(400, (400, 150))
        most = max(map(len, mine))
        index = torch.tensor([[0] * (most - len(places)) + list(places) for places in mine])
        own = [x.gather(2, index[:, None, :, None].expand(2, 2, most, 64)) for x in (keys, values)]
        with pytest.raises(ShapeError, match=r"keys: \d+ tokens, and rank . takes \d+ of 400; give those of share"):
            other.append(*(torch.cat([x, x[:, :, :1]], 2) for x in own), of=400, counts=(400, 150))
        other.append(*own, of=400, counts=(400, 150))
        assert one.own == other.own and all(
            torch.equal(one.cache.dense(side), other.cache.dense(side)) for side in ("keys", "values")
        )


@pytest.mark.usefixtures("group")
def test_caches_of_several_parts_are_refused() -> None:
    from kvdsl.codegen import build_tiers
    from kvdsl.head_cache import HeadCache
    from kvdsl.tiered_cache import TieredCache

    tiered = TieredCache(build_tiers(ALL["h2o"], SHAPE, "torch"), 1)
    with pytest.raises(SchemeError, match="router: Saliency ranks all tokens of a sequence, and a rank has some of th"):
        ContextCache(tiered)  # type: ignore[arg-type]
    with pytest.raises(CacheError, match="cache: HeadCache is no QuantizedCache; give one, of heads under a table"):
        ContextCache(HeadCache([]))  # type: ignore[arg-type]
    heads = ALL["token4"].with_(heads={0: ALL["token2"]})
    assert str(faults(heads)[0]).startswith("heads: a layer under a table of heads is several caches; give each group")


@pytest.mark.usefixtures("group")
def test_caches_that_cannot_be_spread_are_refused() -> None:
    full = fresh("token4", 1)
    full.append(*(cases.numbers(1, 2, 3, 64, seed) for seed in (1, 2)))
    with pytest.raises(CacheError, match="cache: it holds 3 tokens already; give one that is empty"):
        ContextCache(full)
    with pytest.raises(CacheError, match="window: a layer that sees 9 tokens holds no more"):
        ContextCache(fresh("token4", 1, window=9))
    with pytest.raises(ShapeError, match="turn: 65 tokens are no whole number of pages of 64; give a multiple of it"):
        ContextCache(fresh("token4", 1), turn=65)
    with pytest.raises(SchemeError, match="keys.transform: PreRope packs a key by its place.*placed=True"):
        ContextCache(fresh("skvq2", 1))
    made = ContextCache(fresh("token4", 1))
    with pytest.raises(ShapeError, match="softcap: 3.0, and the kernels have none"):
        made.attend(cases.numbers(1, 4, 1, 64, 0), softcap=3.0)
    with pytest.raises(ShapeError, match="query: shape"):
        made.attend(cases.numbers(1, 2, 1, 64, 0))


def test_without_a_group_there_are_no_ranks() -> None:
    with pytest.raises(CacheError, match="group: torch.distributed is not initialized, so there are no ranks; call"):
        ContextCache(fresh("token4", 1))


def test_schemes_are_refused_by_the_field_that_asks_for_all_tokens() -> None:
    places = {name: [fault.place for fault in faults(scheme)] for name, scheme in ALL.items()}
    refused = {name for name, found in places.items() if found}
    routed = {name for name, scheme in ALL.items() if scheme.routed}
    assert routed <= refused and all(
        set(places[name]) <= {"router", "tiers", "requantize", "keys.transform"} or ALL[name].shared for name in refused
    )
    assert {name for name in refused - routed} == {
        name for name, one in ALL.items() if one.keys.rope is not None or one.shared
    } - routed
    assert places["mla_fp8"] == ["values.code"]
    assert (
        places["zipcache"] == ["router", "requantize"]
        and places["hf_quanto4"]
        and places["kvquant3"] == ["keys.transform"]
    )
    assert "ranks all tokens of a sequence, and a rank has some of them" in str(faults(ALL["h2o"])[0])


def test_the_cost_of_a_step_is_a_number_of_rows() -> None:
    shape = SHAPE
    assert step_bytes(shape, 3, 2, 8, checked=False) == 7 * 4 * 3 * 4 * 2 * 65
    assert step_bytes(shape, 3, 2, 8) == 7 * 4 * (3 * 4 * 2 * 65 + 5)
    assert step_bytes(shape, 3, 2, 1) == 0 and math.isfinite(step_bytes(shape, 0, 0, 2))
