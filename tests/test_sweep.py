"""Sweeps on a tiny model: grids, what is no scheme, what a stopped sweep goes on from, fronts, and who is named."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny

import kvdsl
from kvdsl import Codebook, Recent, Rotate, SchemeError, Sketch, Uniform
from kvdsl.codegen import recommending, sweep_run, sweep_time
from kvdsl.codegen.roofline import CARDS, share_on
from kvdsl.cost import bits
from kvdsl.registry import load
from kvdsl.scheme import SIDES, ChannelScale, Scheme
from kvdsl.schemes import ALL, h2o, kivi2, token2, zipcache
from kvdsl.shape import Shape
from kvdsl.sweeping import Grid
from kvdsl.sweeping.choice import Beside, Candidate, candidates, halved, named
from kvdsl.sweeping.file import SweepFile
from kvdsl.sweeping.front import front
from kvdsl.sweeping.grid import LeftOut, Member, axis
from kvdsl.sweeping.results import MEASURES, Figured
from kvdsl.sweeping.words import value

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = tiny.SETTINGS.with_(tasks=("perplexity",), windows=2, sizes=(150,), resamples=50)
GRID = {"base": "token2", "axes": {"bits": [2, 4], "recent": [0, 32]}}


def of(loaded: tiny.Loaded, grid: Any = GRID, **options: Any) -> Any:
    return kvdsl.sweep(grid, loaded, text=tiny.TEXT, settings=SMALL, **{"compiled": False, **options})


# -- grids -----------------------------------------------------------------------------------------------------------


def test_a_grid_is_every_combination_of_its_axes(tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    path.write_text(
        'base = ["token2", "mine.toml"]\nbeside = "quarot2"\n[axes]\nbits = [2, 3]\n'
        'values.transform = ["none", "hadamard"]\n"recent" = [0, 64]\n'
    )
    (tmp_path / "mine.toml").write_text(kivi2.to_toml())
    found, left = Grid.read(path).members()
    assert len(found) + len(left) == 1 + 2 * 8 and found[0] == Member("quarot2", ALL["quarot2"])
    by_name = {one.name: one for one in found}
    one = by_name["token2 bits=3 values.transform=hadamard recent=64"]
    right = token2.with_(bits=3, recent=Recent(64), **{"values.transform": (Rotate(),)})
    assert one.scheme == right.with_(source=one.name) and one.scheme.hash == right.hash
    assert one.axes == (("bits", "3"), ("values.transform", "hadamard"), ("recent", "64"))
    assert {one.name.split()[0] for one in left} == {"mine"}  # groups of tokens need a window


def test_what_a_rule_refuses_is_told_with_its_sentence() -> None:
    found, left = Grid.of({"base": "kivi2", "axes": {"recent": [0, 128], "keys.scale.tokens": [32, 48]}}).members()
    assert [one.name for one in found] == ["kivi2 recent=128 keys.scale.tokens=32"]
    why = {one.name: one.why for one in left}
    with pytest.raises(SchemeError) as error:
        kivi2.with_(recent=None)
    assert why["kivi2 recent=0 keys.scale.tokens=32"] == str(error.value)
    assert "add recent=Recent(32)" in str(error.value) and "48" in why["kivi2 recent=128 keys.scale.tokens=48"]


def test_equal_schemes_are_measured_once_and_places_may_move_together() -> None:
    axes = {"keys.bits, values.bits": [[2, 4], [4, 4], [2, 4]], "both.scale.dtype": ["bf16"], "recent": [0, "none"]}
    found, left = Grid.of({"base": "token2", "axes": axes}).members()
    told = [tuple(one.scheme.side(side).code for side in SIDES) for one in found]
    assert told == [(Uniform(2), Uniform(4)), (Uniform(4), Uniform(4))]
    assert all(one.scheme.keys.scale == one.scheme.values.scale for one in found)
    assert {one.why for one in left} == {f"it is the same scheme as {one.name}" for one in found}


def test_bits_are_of_the_code_that_another_axis_chose() -> None:
    codes = ["Uniform(2)", "Codebook(2, 'normal')", "Sketch(64)"]
    axes = {"bits": [2, 3], "keys.code": codes, "keys.scale": ["none", "per_token()"], "keys.code.dim": [128]}
    found, left = Grid.of({"base": "token2", "axes": axes}).members()
    assert {one.scheme.keys.code for one in found} == {Sketch(128)} and len(found) == 2
    assert [one.scheme.values.code for one in found] == [Uniform(2), Uniform(3)]
    del axes["keys.code.dim"]
    found, left = Grid.of({"base": "token2", "axes": axes}).members()
    told = [one.scheme.keys.code for one in found if one.scheme.keys.scale is not None]
    assert told == [Uniform(2), Codebook(2, "normal"), Uniform(3), Codebook(3, "normal")]
    assert any("leave scale out" in one.why for one in left)


def test_a_sample_is_drawn_by_its_seed() -> None:
    grid = Grid.of({"base": "token2", "axes": {"bits": [2, 3, 4], "recent": [*range(0, 512, 16)]}})
    drawn = [[one.name for one in grid.members(5, seed)[0]] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and all(len(one) == 5 for one in drawn)


def test_values_are_words_tables_or_calls() -> None:
    assert value("keys.transform", "none") == () and value("keys.residual", "none") is None
    assert value("recent", 0) is None and value("recent", 64) == Recent(64)
    assert value("recent", 64, Recent(32, "whole")) == Recent(64, "whole")
    assert value("keys.transform", ["hadamard", "absmax"]) == (Rotate(), ChannelScale("absmax"))
    assert value("keys.code", {"part": "Sketch", "dim": 64}) == Sketch(64)
    assert value("keys.code", "Codebook(2, 'normal')") == Codebook(2, "normal")
    assert value("keys.scale.dtype", "bf16") == "bf16" and value("keys.scale.channels", "ALL") is kvdsl.ALL
    whole = value("keys", "Store(Uniform(2), scale=per_token(range='absmax'), transform=[Rotate()])")
    assert whole == kvdsl.Store(Uniform(2), scale=kvdsl.per_token(range="absmax"), transform=Rotate())
    for place, told, message in (
        ("keys.transform", "hadamrd", "use hadamard"),
        ("keys.code", "Unifrom(2)", "Unifrom is no part, Uniform is"),
        ("keys.code", "Uniform(2", "is no Python"),
        ("keys.code", "open('x').read()", "neither a part nor a plain value"),
        ("keys.code", "Uniform(bit=2)", "makes no part"),
        ("keys.code", {"part": "Unifrom"}, "use Uniform"),
    ):
        with pytest.raises(SchemeError, match="keys") as error:
            value(place, told)
        assert message in str(error.value)


def test_axes_of_the_command_line() -> None:
    assert axis("bits=2,3") == ("bits", [2, 3]) and axis("recent = [0, 128]") == ("recent", [0, 128])
    assert axis("keys.code=Uniform(2),Codebook(2, 'normal')")[1] == ["Uniform(2)", "Codebook(2, 'normal')"]
    assert axis("values.transform=none,hadamard")[1] == ["none", "hadamard"]


@pytest.mark.parametrize(
    "told, message",
    [
        ({"bases": "kivi2"}, "grid: it has no field 'bases'; use base"),
        ({"axes": {"bits": [2]}}, "grid: no scheme is in it"),
        ({"base": "kivi2", "axes": {"bits": 2}}, r"axes: bits has no list of values; give some, as bits = \[2\]"),
        ({"base": "kivi2", "axes": {"keys.code.bit": [2]}}, "axes: no base has a place 'keys.code.bit'"),
        ({"base": "kivi2", "axes": {"keys.bits, values.bits": [2]}}, "axes: 2 are no 2 values"),
        ({"base": "kivi2", "axes": {"bits": [2] * 101, "recent": [0] * 100}}, "10100 combinations are more than 10000"),
        ({"base": "nonsense"}, "nonsense"),
    ],
)
def test_a_grid_that_is_none_is_refused(told: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Grid.of(told).members()


# -- sweeps ----------------------------------------------------------------------------------------------------------


def test_a_sweep_measures_what_an_evaluation_does_and_keeps_it(small: tiny.Loaded, tmp_path: Path) -> None:
    path = tmp_path / "some.sqlite"
    found = of(small, {**GRID, "beside": ["bitdecoding4"]}, out=path)
    right = kvdsl.evaluate([one.scheme for one in found.members], small, text=tiny.TEXT, settings=SMALL)
    assert len(found.members) == 4 and found.path == path
    for one, told in zip(found.members, right.results, strict=True):
        assert told.tasks.perplexity and one.figures["kl"] == told.tasks.perplexity.kl
        assert one.figures["bits"] == told.bits and one.figures["perplexity"] == told.perplexity
        assert one.figures["packed_bits"] == bits(one.scheme, 32, 2).mean
        assert set(MEASURES) == set(one.figures) and len(one.windows) == SMALL.windows
    assert [one.name for one in found.left_out] == ["bitdecoding4"]
    assert "groups of 128 channels do not divide head_dim 32" in found.left_out[0].why
    with sqlite3.connect(path) as file:
        rows = file.execute("select name, measure, value from figures where measure = 'kl'").fetchall()
    assert rows == [(one.name, "kl", one.figures["kl"]) for one in found.members]
    assert SweepFile(path).read().members == found.members


def test_a_stopped_sweep_goes_on_and_measures_nothing_twice(
    small: tiny.Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvdsl.evaluation import run

    counted, limit = list[str](), 5
    act = run._Act.__call__

    def counting(self: Any, scheme: Scheme, params: Any) -> Any:
        if len(counted) == limit:
            raise KeyboardInterrupt
        counted.append(scheme.hash)
        return act(self, scheme, params)

    monkeypatch.setattr(run._Act, "__call__", counting)
    monkeypatch.setattr(sweep_run, "TOGETHER", 2)
    path = tmp_path / "some.sqlite"
    with pytest.raises(KeyboardInterrupt):
        of(small, out=path)
    first = SweepFile(path).read()
    assert len(first.members) == 2 and len(counted) == 5  # one pair whole, one row of the next
    limit = 100
    found = of(small, out=path)
    assert len(counted) == 4 * SMALL.windows and len(found.members) == 4
    again = of(small, out=path)
    assert len(counted) == 4 * SMALL.windows and again.members == found.members
    alone = of(small)
    for one, other in zip(alone.members, found.members, strict=True):
        assert {**one.figures, "seconds": 0} == {**other.figures, "seconds": 0} and one.name == other.name


def test_a_file_is_of_one_sweep(small: tiny.Loaded, tmp_path: Path) -> None:
    path = tmp_path / "some.sqlite"
    grid = {"base": "token2"}
    of(small, grid, out=path)
    more = of(small, {"base": "token2", "axes": {"bits": [2, 4]}}, out=path)  # another grid adds to it
    assert len(more.members) == 2 and len(SweepFile(path).read().members) == 2
    faster = of(small, grid, out=path, gpu="B200")  # and so does another GPU, to predicted times alone
    assert faster.members[0].figures["microseconds"] < more.members[0].figures["microseconds"]
    with pytest.raises(ValueError, match=r"its settings {'windows': 2} and not {'windows': 1}"):
        kvdsl.sweep(grid, small, text=tiny.TEXT, settings=SMALL.with_(windows=1), out=path)
    other = tmp_path / "other.sqlite"
    other.write_text("something else, long enough to be no header of a file of SQLite" * 9)
    with pytest.raises(ValueError, match="it is no file of a sweep"):
        of(small, grid, out=other)
    with pytest.raises(ValueError, match="there is no folder"):
        of(small, grid, out=tmp_path / "none" / "x.sqlite")


def test_wrong_use_is_refused_before_anything_runs(small: tiny.Loaded) -> None:
    for options, message in (
        ({"engine": "dask"}, "engine: 'dask' is none of local, ray"),
        ({"workers": 0}, "workers: 0 is no whole number"),
        ({"workers": 2}, "model: a loaded one cannot be handed to other processes"),
        ({"gpu": "TPU"}, "gpu: 'TPU' is none of A100 80 GB, H100"),
    ):
        with pytest.raises(ValueError, match=message):
            of(small, **options)
    with pytest.raises(ValueError, match="tasks: a sweep compares divergence"):
        kvdsl.sweep(GRID, small, text=tiny.TEXT, settings=SMALL.with_(tasks=["copy"]))


# -- predicted times -------------------------------------------------------------------------------------------------

H100 = next(gpu for gpu in CARDS if gpu.name == "H100")
SIZE: dict[str, Any] = {"tokens": 4096, "batch": 2, "gpu": H100}


def test_without_machine_code_the_time_is_bytes_over_the_limit() -> None:
    shape = Shape(64, 2, 4)
    for scheme in (token2, kivi2, kivi2.with_(layers={0: token2}), zipcache, h2o):
        found = sweep_time.predicted_time(scheme, shape, 3, **SIZE)
        total = bits(scheme, 64, 2, tokens=4096, layers=3).mean * 2 * 2 * 64 * 4096 * 3 * 2 / 8
        right = total / (share_on(H100, {}) * H100.bandwidth * 1e6)
        kept = 0.9 if scheme.routed else 1 - 1e-9  # what a router keeps is not read
        assert kept * right <= found["microseconds"] <= right * (1 + 1e-9)
        assert found["share"] == pytest.approx(share_on(H100, {}))


def test_machine_code_slows_packed_bytes_and_not_exact_ones() -> None:
    shape, none = Shape(64, 2, 4), dict[Any, float]()
    half = {(kivi2, shape): share_on(H100, {}) / 2}
    times = [sweep_time.predicted_time(kivi2, shape, 1, compiled=one, **SIZE)["microseconds"] for one in (none, half)]
    counted = bits(kivi2, 64, 2, tokens=4096)
    assert times[1] / times[0] == pytest.approx(2 - counted.window / counted.mean)


def test_a_model_is_read_as_it_would_be_served() -> None:
    served = [Shape(64, dtype=one).deployed.dtype for one in ("fp32", "fp16", "bf16")]
    assert served == ["fp16", "fp16", "bf16"]


def test_kernels_are_compiled_where_they_can_be() -> None:
    pytest.importorskip("triton")
    found = sweep_time.compiled_shares([token2, kivi2.with_(layers={0: token2})], Shape(64, 2, 4), 2, H100)
    if not found:
        pytest.skip("no kernel compiles here")
    assert len(found) == 2 and all(0 < share <= share_on(H100, {}) for share in found.values())


# -- fronts and choices ----------------------------------------------------------------------------------------------


def test_the_front_is_what_none_dominates() -> None:
    points = [(4, 0.1), (2, 0.9), (3, 0.5), (3, 0.4), (3.5, 0.4), (5, 0.1), (1, None), (2.5, float("inf")), (2, 0.9)]
    rows = [{"bits": cost, "kl": loss} for cost, loss in points]
    assert front(rows, "bits", "kl") == [1, 3, 0] and front([], "bits", "kl") == []


def figured(name: str, kl: float | None, *, scheme: str = "token2", spread: float = 0.01) -> Figured:
    windows = {start: (kl or 0) + spread * sign for start, sign in ((0, 1), (100, -1), (200, 0))}
    return Figured(name, load(scheme), (), {"kl": kl, "bits": 3.0, "kl_error": 0.01}, windows)


def beside(*told: tuple[str, float, float | None]) -> list[Beside]:
    return [Beside("", takes, 1, figured(name, kl)) for name, takes, kl in told]


def test_the_best_within_the_budget_is_named_beside_its_neighbours() -> None:
    measured = beside(("a", 3.0, 0.3), ("b", 2.9, 0.2), ("c", 2.0, 0.5), ("d", 4.0, 0.1), ("e", 3.0, None))
    chosen, others, why = named(measured, 3)
    assert chosen.figured.name == "b" and chosen.role == "named"
    assert [(one.figured.name, one.role) for one in others] == [
        ("a", "next best"), ("c", "cheaper"), ("d", "beyond the budget"),
    ]  # fmt: skip
    assert why[0].startswith("b takes 2.900 of 3 bits and loses 0.2000 nats a token")
    assert why[1] == "next best: a, 0.100 bits more, loses 0.3000, 0.1000 ± 0.0000 more"
    assert why[3].endswith("1.100 bits more, loses 0.1000, 0.1000 ± 0.0000 less")
    with pytest.raises(ValueError, match="nothing that was measured takes 1 bits or fewer, the fewest are 2.000"):
        named(measured, 1)


def test_what_windows_do_not_tell_apart_is_said() -> None:
    one, other = figured("a", 0.2, spread=0.1), figured("b", 0.21, spread=-0.1)
    _, _, why = named([Beside("", 3, 1, one), Beside("", 3, 1, other)], 3)
    assert why[1].endswith("more, which these windows do not tell apart")


def test_a_budget_is_kept_and_what_is_left_out_is_told() -> None:
    names = ("kivi2", "token2", "token3", "token4", "streaming", "bitdecoding2", "fp16", "turboquant1")
    members = [Member(name, load(name)) for name in names]
    within, beyond, left = candidates(members, 3.0, Shape(64, 2), 2, None, 512)
    assert [one.member.name for one in within] == ["kivi2", "token2"]
    assert [one.member.name for one in beyond] == ["token3"]  # 3.5 at a head of 64 channels
    why = {one.name: one.why for one in left}
    assert "groups of 128 channels do not divide head_dim 64" in why["bitdecoding2"]
    assert why["streaming"].startswith("it keeps a fixed number of tokens")
    assert why["token4"] == "4.500 bits are more than 3" and why["turboquant1"] == "1.250 bits leave much of 3 unused"
    within, _, left = candidates(members, 3.0, Shape(64, 2), 2, None, 100)
    assert [one.member.name for one in within] == ["token2"]
    assert "100% of a prompt of 100 tokens stand exactly" in {one.name: one.why for one in left}["kivi2"]
    within, _, _ = candidates(members, 3.0, Shape(64, 2), 2, 1024, 512)  # its window counts
    assert "kivi2" not in [one.member.name for one in within]
    with pytest.raises(ValueError, match="takes 0.5 bits or fewer; the fewest are 1.250, of turboquant1; give more"):
        candidates(members, 0.5, Shape(64, 2), 2, None, 512)
    generous, _, _ = candidates(members, 12.0, Shape(64, 2), 2, None, 512)  # nothing is near it: the most that fit
    assert [one.member.name for one in generous] == ["token4", "token3", "kivi2"]


def test_rounds_keep_the_best_and_measure_the_last_alike() -> None:
    losses = {f"s{i}": i / 10 for i in range(12)} | {"cheap": 0.95, "more": 0.01, "most": 0.02, "broken": 0.0}
    takes = {"cheap": 2.0, "more": 3.5, "most": 3.6}
    made = {name: Candidate(Member(name, token2), takes.get(name, 3.0)) for name in losses}
    asked = list[list[str]]()

    def look(members: Sequence[Member], number: int) -> dict[str, Figured | LeftOut]:
        asked.append([one.name for one in members])
        return {
            one.name: LeftOut(one.name, "it broke")
            if one.name == "broken"
            else figured(one.name, losses[one.name] + (0.35 if one.name == "s0" and number > 1 else 0))
            for one in members
        }

    within = [one for name, one in made.items() if name not in ("more", "most")]
    last, looked, left = halved(within, [made["more"], made["most"]], look)
    assert [len(one) for one in asked] == [16, 5, 5] and asked[1] == ["s0", "s1", "s2", "s3", "s4"]
    assert [one.figured.name for one in last] == ["more", "s1", "s2", "s3", "cheap"]  # luck of the first round is gone
    assert all(one.round == 3 for one in last) and left == [LeftOut("broken", "it broke")]
    assert len(looked) == 15 and named(last, 3)[0].figured.name == "s1"


def test_recommend_names_the_best_that_was_measured(small: tiny.Loaded, tmp_path: Path) -> None:
    rounds = (SMALL.with_(windows=1), SMALL, SMALL.with_(seed=1))
    names = ["token2", "token3", "turboquant2", "token4", "bitdecoding2"]
    options: dict[str, Any] = {"bits": 4.0, "among": names, "text": tiny.TEXT, "settings": rounds}
    found = kvdsl.recommend(small, out=tmp_path / "x.toml", **options)
    right = kvdsl.evaluate(["token2", "token3", "turboquant2"], small, text=tiny.TEXT, settings=rounds[2])
    loss = {one.scheme: one.tasks.perplexity.kl for one in right.results if one.tasks.perplexity}
    assert found.chosen.figured.name == min(loss, key=lambda name: loss[name]) and found.chosen.bits <= 4
    assert found.chosen.figured.figures["kl"] == min(loss.values())
    assert load(tmp_path / "x.toml") == found.scheme == load(found.chosen.figured.name)
    assert "beyond the budget" in " ".join(one.role for one in found.beside)
    assert "bitdecoding2" in [one.name for one in found.left_out]
    again = kvdsl.recommend(small, **options)
    assert again.chosen.figured.name == found.chosen.figured.name and again.why == found.why
    with pytest.raises(ValueError, match="bits: no scheme that fits the model takes 1 bits or fewer; the fewest"):
        kvdsl.recommend(small, **{**options, "bits": 1.0})


def test_recommend_takes_a_sweep_and_measures_nothing(
    small: tiny.Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "some.sqlite"
    swept = of(small, out=path)
    monkeypatch.setattr(recommending, "Measuring", None)
    found = kvdsl.recommend(None, bits=5, sweep=path)
    best = min(swept.members, key=lambda one: float(one.figures["kl"] or 0))
    assert found.chosen.figured == replace(best, figures=found.chosen.figured.figures)
    fewer = kvdsl.recommend(None, bits=3.5, sweep=path)
    assert fewer.chosen.bits == 3.0 and fewer.scheme.keys.code == Uniform(2)
    assert len([one for one in fewer.left_out if "are more than 3.5" in one.why]) == 2
    for options, message in (
        ({"bits": 1, "sweep": path}, "nothing that was measured takes 1 bits or fewer"),
        ({"bits": 3, "sweep": tmp_path / "none.sqlite"}, "is no file; give one that `kvdsl sweep --out` wrote"),
        ({"bits": 0}, "bits: 0 is no budget"),
        ({"bits": 3}, "model: none is given"),
        ({"bits": 3, "sweep": path, "out": tmp_path / "x.txt"}, "is no .toml or .json file; name one, as x.toml"),
    ):
        with pytest.raises(ValueError, match=message):
            kvdsl.recommend(None, **options)
    with pytest.raises(ValueError, match="not of smollm2; give its own"):
        kvdsl.recommend("smollm2", bits=3, sweep=path)
