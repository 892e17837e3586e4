"""What `kvdsl bench` says of what a clock says: everything but the timing itself, on a GPU that there is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from typing import Any

import pytest
import torch

import kvdsl.peers
from kvdsl import bench
from kvdsl.bench import Size, numbers
from kvdsl.bench_cache import FilledPages, FilledTiers, Numbers, filled
from kvdsl.codegen import benching, build, build_tiers
from kvdsl.codegen.bench_told import cells, told
from kvdsl.codegen.benching import Machine, results
from kvdsl.exact import Tokens, attended, relative_error
from kvdsl.peers import Peer, Ready, known
from kvdsl.peers.sdpa import Sdpa
from kvdsl.schemes import ALL
from kvdsl.timing import HostClock

CPU, LIMIT = torch.device("cpu"), 4e12


@dataclass
class FakeClock:
    """Every call takes a microsecond more than the one before it, each sample a tenth of one more than the last."""

    calls: list[tuple[bool, bool]] = field(default_factory=list)

    def seconds(self, call: Callable[[], object], samples: int, *, cold: bool, graph: bool) -> tuple[float, ...]:
        call()
        self.calls.append((cold, graph))
        return tuple((len(self.calls) + i / 10) * 1e-6 for i in range(samples))


def machine(clock: FakeClock, rows: Sequence[dict[str, Any]] = ()) -> Machine:
    """A GPU on this CPU: it reads 4 TB/s, half of that where a call reads little."""
    return Machine("GPU", CPU, clock, lambda n: LIMIT if n is None else LIMIT / 2, lambda schemes, size: list(rows))


@dataclass(frozen=True)
class Other:
    """A peer that does as it is told."""

    name: str = "other"
    bits: float = 8
    why: str | None = None
    raises: Exception | None = None
    factor: float = 1.0

    def why_not(self, size: Size) -> str | None:
        return self.why

    def prepare(self, size: Size, normal: Numbers) -> Ready:
        if self.raises is not None:
            raise self.raises
        ready = Sdpa().prepare(size, normal)
        return Ready(lambda: ready.call() * self.factor, ready.read_bytes // 2, ready.decoded, graph=False)


def of(
    peers: Sequence[Peer] = (), clock: FakeClock | None = None, rows: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    return results({"token4": ALL["token4"]}, ["2x2x200"], 4, 64, peers, machine(clock or FakeClock(), rows))


def test_a_row_has_the_medians_quantiles_and_shares_of_its_samples() -> None:
    """The call is timed first, then hot, then what users do without it, then SDPA; 21 samples, cold but for the hot."""
    clock = FakeClock()
    (row,) = of(clock=clock, rows=[{"scheme": "token4", "gpu": "GPU", "share": 0.9}])["results"]
    assert clock.calls[:4] == [(True, True), (False, True), (True, True), (True, True)]
    assert [row[name] for name in ("us", "us_hot", "us_unpack", "us_fp16")] == pytest.approx([2, 3, 4, 5])
    assert (row["us_p10"], row["us_p90"]) == pytest.approx((1.2, 2.8))
    rate = row["bytes"] / 2e-6
    assert row["gbps"] == pytest.approx(rate / 1e9) and row["limit_gbps"] == LIMIT / 2e9
    assert (row["share"], row["share_own"]) == pytest.approx((rate / LIMIT, 2 * rate / LIMIT))
    assert (row["speedup_fp16"], row["speedup_unpack"]) == pytest.approx((2.5, 2))
    assert row["schedule"] == "torch"
    assert row["predicted_share"] == 0.9 and row["error"] < 1e-3 and row["error_rows"] == 2 * 8 and 4 < row["bits"] < 6


def test_what_was_read_for_the_limit_is_given_back_before_a_scheme_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the first scheme's cache lies in what is left of it, and may be read more slowly than any other."""
    clock, freed = FakeClock(), list[int]()
    monkeypatch.setattr(benching, "_free", lambda machine: freed.append(len(clock.calls)))
    of(clock=clock)
    assert freed[0] == 0 and clock.calls


def test_the_document_has_what_scripts_read() -> None:
    found = of()
    assert {"device", "read_limit_gbps", "versions", "date", "command", "note", "predicted", "peers"} <= found.keys()
    assert (found["device"], found["read_limit_gbps"], found["note"]) == ("GPU", LIMIT / 1e9, None)
    wanted = {"scheme", "kernel", "shape", "us", "us_p10", "us_p90", "us_fp16", "gbps", "share", "bytes", "group"}
    assert wanted | {"head_dim", "speedup_fp16", "speedup_unpack"} <= found["results"][0].keys()
    assert found["us_launch"] > 0 and "seconds" not in found["results"][0]


def test_a_peer_is_timed_missing_or_failed_and_the_run_goes_on() -> None:
    broken = Other("broken", raises=RuntimeError("no kernel image\nand a long story"))
    peers: list[Peer] = [
        Sdpa(),
        Other("half"),
        Other("none", why="not installed: pip install none"),
        broken,
        Other("last"),
    ]
    clock = FakeClock()
    found = of(peers, clock)
    sdpa, half, none, failed, last = found["peers"]
    assert (sdpa["speedup_fp16"], half["speedup_fp16"]) == pytest.approx((1, 6 / 7))
    assert (
        half["us"] == pytest.approx(7)
        and half["bits"] == 8
        and half["error"] < 1e-3
        and clock.calls[5] == (True, False)
    )
    assert none["missing"] == "not installed: pip install none" and "us" not in none
    assert failed["failed"] == "RuntimeError: no kernel image" and last["us"] > 0
    assert found["results"][0]["speedup_peers"] == pytest.approx({"SDPA fp16": 3, "half": 3.5, "last": 4})
    shown = " ".join(str(table.caption) for table in told(found))
    assert "none: not installed: pip install none" in shown and "broken: failed: RuntimeError" in shown


def test_a_peer_that_is_wrong_says_so() -> None:
    (row,) = of([Other(factor=1.1)])["peers"]
    assert row["error"] == pytest.approx(0.1, rel=1e-2) and row["error_rows"] == 16


def test_what_does_not_fit_is_a_row_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4 GiB.")

    monkeypatch.setattr(bench, "measured", refused)
    found = of([Sdpa()], rows=[{"scheme": "token4", "gpu": "GPU", "share": 0.9}])
    assert found["results"][0]["failed"] == "CUDA out of memory" and found["peers"][0]["us"] > 0
    assert cells(found["results"][0], ["bits", "us"]) == ["failed", ""]
    assert "token4: failed: CUDA out of memory" in str(told(found)[0].caption)


@pytest.mark.parametrize("name", ["token4", "kivi2_sinks", "h2o"])
def test_the_error_is_that_of_the_kernels_over_what_the_cache_holds(name: str) -> None:
    """Pages, rings of exact rows, sinks, tiers and dropped tokens: float64 over the decoded cache agrees with the call,
    and an output that is a tenth too large is off by a tenth."""
    size, scheme = Size(3, 2, 300, 2, 64), ALL[name]
    kernels = (build_tiers if scheme.routed else build)(scheme, size.shape, backend="torch")
    normal = numbers(size, CPU)
    full, query = filled(kernels, size.batch, size.tokens, normal), normal(size.q_heads, 1)
    assert isinstance(full, FilledTiers if scheme.routed else FilledPages)
    assert full.attend_unpacked(query).shape == full.attend_hot(query).shape == query.shape
    out = full.attend(query)[[0, 2], :, 0]
    exact = torch.stack([attended(query[b, :, 0], x) for b, x in zip((0, 2), full.decoded((0, 2)), strict=True)])
    assert relative_error(out, exact) < 1e-3
    assert relative_error(1.1 * out, exact) == pytest.approx(0.1, rel=0.02)


def test_what_is_hot_is_few_full_pages_of_the_cache() -> None:
    """Every page number of the hot table is one of the first full pages, so that no byte that it reads is not packed
    and all of them fit the L2 cache."""
    size = Size(2, 2, 1000, 2, 64)
    full = filled(build(ALL["token4"], size.shape, backend="torch"), size.batch, size.tokens, numbers(size, CPU))
    assert isinstance(full, FilledPages)
    kernels, hot, state = full.cache.kernels, full._hot, full.cache.state()
    whole = full.cache.packed("keys")[0] // kernels.page_tokens
    assert set(hot.table.unique().tolist()) == set(state.table[0, :whole].tolist()) and hot.table.is_contiguous()
    assert hot.table.shape == state.table.shape and whole * kernels.page_bytes <= 4 << 20


def test_attention_in_pieces_is_attention() -> None:
    """In any order, with tokens that a head does not have: the softmax of all scores, in float64."""
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (torch.randn(*n, 32, generator=generator) * 4 for n in ((4,), (2, 50), (2, 50)))
    there = torch.rand(2, 50, generator=generator) < 0.5
    there[:, :10] = torch.tensor([[False], [True]])  # the first head has none of the first piece

    def pieces() -> Iterator[Tokens]:
        for begin, end in ((0, 10), (30, 50), (10, 30)):
            yield Tokens(keys[:, begin:end], values[:, begin:end], there[:, begin:end])

    scores = (query.double().view(2, 2, 32) @ keys.double().mT * 32**-0.5).masked_fill(~there[:, None], -torch.inf)
    exact = (scores.softmax(-1) @ values.double()).flatten(0, 1)
    assert relative_error(attended(query, pieces()), exact) < 1e-12


def test_registered_peers_come_last_and_broken_ones_are_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [
        EntryPoint("mine", f"{__name__}:Other", kvdsl.peers.GROUP),
        EntryPoint("broken", "kvdsl.no_such_module:X", kvdsl.peers.GROUP),
    ]
    monkeypatch.setattr(kvdsl.peers, "entry_points", lambda group: entries)
    with pytest.warns(UserWarning, match="'broken'.*does not load"):
        found = known()
    assert found[0].name == Sdpa().name and found[-1].name == "other"
    assert len({peer.name for peer in found}) == len(found) >= 11


def test_the_clock_of_a_cpu_times_what_it_calls() -> None:
    count = [0]

    def call() -> None:
        count[0] += 1

    assert len(HostClock().seconds(call, 21, cold=True, graph=True)) == 5 and count == [6]
