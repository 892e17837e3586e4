"""Sweeps on a tiny model: grids, what is no scheme, what a stopped sweep goes on from, predicted times."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest
import sweep_cases
import tiny
from sweep_cases import GRID, SMALL, of

import kvdsl
from kvdsl import Codebook, Recent, Rotate, SchemeError, Sketch, Uniform
from kvdsl.codegen import sweep_run, sweep_time
from kvdsl.codegen.roofline import CARDS, share_on
from kvdsl.cost import bits
from kvdsl.scheme import SIDES, ChannelScale
from kvdsl.schemes import ALL, h2o, kivi2, token2, zipcache
from kvdsl.shape import Shape
from kvdsl.sweeping import Grid
from kvdsl.sweeping.file import SweepFile
from kvdsl.sweeping.grid import Member, axis
from kvdsl.sweeping.results import MEASURES
from kvdsl.sweeping.words import value

pytestmark = pytest.mark.usefixtures("one_thread")


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
    measured = sweep_cases.Measured(monkeypatch, stop=5)
    monkeypatch.setattr(sweep_run, "TOGETHER", 2)
    path = tmp_path / "some.sqlite"
    with pytest.raises(KeyboardInterrupt):
        of(small, out=path)
    first = SweepFile(path).read()
    assert len(first.members) == 2 and measured.rows == 5  # one pair whole, one row of the next
    measured.stop = None
    found = of(small, out=path)
    assert measured.rows == 4 * SMALL.windows and len(found.members) == 4
    again = of(small, out=path)
    assert measured.rows == 4 * SMALL.windows and again.members == found.members
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
