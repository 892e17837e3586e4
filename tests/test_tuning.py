"""Schedules that timing found: what is tried, what is kept where, and that no file can do harm.  What is launched under
them is interpreted: tests/interpreted."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from tune_cases import CARD, ListedClock

import kvdsl
from kvdsl import codegen
from kvdsl.codegen import doctor, schedules, store, tuning
from kvdsl.codegen.cli import run
from kvdsl.codegen.occupancy import Room, Work, filling, ranked
from kvdsl.codegen.plan import plan_for
from kvdsl.codegen.schedules import Bucket, Card, Schedule, Schedules
from kvdsl.errors import BackendError, SchemeError
from kvdsl.schemes import ALL, h2o, token4
from kvdsl.shape import Shape

SHAPE = Shape(128, 8, 32)
AT = Bucket(8, 32768)
BEST = Schedule(24, 2, 1)
PLAN = plan_for(token4, SHAPE)
TEXT = codegen.render(PLAN, "triton", "token4")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of its own, and a GPU that there is not."""
    monkeypatch.setenv("KVDSL_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(schedules, "this_card", lambda: CARD)
    store.say.cache_clear()
    return tmp_path


def kept(bucket: Bucket = AT, best: Schedule = BEST, card: Card = CARD) -> Path:
    return schedules.keep(Schedules(card, schedules.digest(PLAN, TEXT)), bucket, best, {"timed": []})


# -- files -----------------------------------------------------------------------------------------------------------


def test_what_is_kept_is_found_again_and_said(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert schedules.known(PLAN, TEXT).source == "model"
    path, other = kept(), kept(Bucket(1, 4096), BEST._replace(splits=3))
    assert path.parent == other.parent == home / "schedules"
    assert schedules.known(PLAN, TEXT).best == {AT: BEST, Bucket(1, 4096): BEST._replace(splits=3)}
    kept(best=BEST._replace(splits=25))
    assert schedules.known(PLAN, TEXT).best[AT].splits == 25 and len(list(path.parent.iterdir())) == 2
    assert run(["show", "token4", "--stage", "plan"]) == 0
    shown = capsys.readouterr().out
    assert f"schedule of decode: tuned on {CARD}" in shown
    assert "about 8 x 32768 tokens: 25 programs a sequence, 2 stages, 1 warps\n" in shown
    assert run(["show", "token4", "--stage", "plan", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["stages"]["plan"]["schedule"]
    assert (
        told["from"] == f"tuned on {CARD}"
        and {"batch": 1, "tokens": 4096, "splits": 3, "stages": 2, "warps": 1} in (told["tuned"])
    )
    assert doctor.report()["schedules"] == f"2 tuned on {CARD}, else the model's"


def test_it_is_of_one_scheme_one_shape_and_one_kind_of_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    kept()
    wider = plan_for(token4, Shape(64, 8, 32))
    for plan in (wider, plan_for(ALL["token2"], SHAPE)):
        assert not schedules.known(plan, codegen.render(plan, "triton", "token4")).best
    assert not schedules.known(PLAN, TEXT.replace("tl.dot", "tl.dot ", 1)).best
    assert schedules.known(PLAN, codegen.render(PLAN, "triton", "by_another_name")).best
    for other in (CARD._replace(arch="sm_80"), CARD._replace(name="NVIDIA A100")):
        monkeypatch.setattr(schedules, "this_card", lambda other=other: other)
        assert schedules.known(PLAN, TEXT).source == "model"


def test_where_there_are_no_files_no_gpu_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedules, "this_card", lambda: pytest.fail("asked"))
    assert schedules.known(PLAN, TEXT).best == {}


def change(**fields: Any) -> Callable[[bytes], bytes]:
    def changed(raw: bytes) -> bytes:
        document = json.loads(raw)
        document["schedule"] |= {name: fields.pop(name) for name in BEST._fields if name in fields}
        return json.dumps(document | fields).encode()

    return changed


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "half": lambda raw: raw[: len(raw) // 2],
    "empty": lambda raw: b"",
    "zeros": lambda raw: bytes(len(raw)),
    "garbage": lambda raw: b"\xff" * 100,
    "a list": lambda raw: b"[1, 2]",
    "deep": lambda raw: b"[" * 60000,
    "another device": change(device="NVIDIA A100"),
    "another architecture": change(arch="sm_80"),
    "another plan": change(plan="0" * 16),
    "another format": change(format=1),
    "no power of 2": change(batch=3),
    "no batch": change(batch=0),
    "no number": change(tokens="32768"),
    "no programs": change(splits=0),
    "too many programs": change(splits=1000),
    "half a program": change(splits=1.5),
    "true": change(stages=True),
    "no depth": change(stages=-1),
    "warps that are not compiled": change(warps=4),
    "no schedule": change(schedule=None),
    "nothing in it": change(schedule={}),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_or_foreign_file_is_passed_over_and_named(name: str) -> None:
    path, _ = kept(), kept(Bucket(1, 4096))
    path.write_bytes(DAMAGE[name](path.read_bytes()))
    with pytest.warns(RuntimeWarning, match="is not used") as said:
        found = schedules.known(PLAN, TEXT)
    assert found.best == {Bucket(1, 4096): BEST} and len(said) == 1
    assert str(path) in str(said[0].message) and "kvdsl tune" in str(said[0].message)
    kept()
    assert AT in schedules.known(PLAN, TEXT).best


def test_writers_at_the_same_time_leave_a_whole_file() -> None:
    path = kept()
    threads = [Thread(target=lambda n=n: [kept(best=BEST._replace(splits=n + 1)) for _ in range(40)]) for n in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            assert schedules.known(PLAN, TEXT).best[AT].splits in (1, 2, 3, 24)
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_a_folder_that_others_may_write_is_refused(home: Path) -> None:
    (home / "schedules").mkdir()
    os.chmod(home / "schedules", 0o777)
    with pytest.raises(BackendError, match="others may write into .*; set KVDSL_CACHE_DIR"):
        kept()


# -- what is tried ---------------------------------------------------------------------------------------------------


def test_calls_of_about_one_size_share_a_schedule() -> None:
    assert Bucket.of(8, 32768) == Bucket.of(6, 24000) == Bucket.of(11, 46000) == AT
    assert Bucket.of(5, 32768).batch == 4 and Bucket.of(12, 32768).batch == 16 and Bucket.of(0, 0) == (1, 1)
    for number in range(1, 2000):
        bucket = Bucket.of(number, number)
        assert Bucket.of(*bucket) == bucket and 0.7 < bucket.batch / number < 1.42


class Launched:
    """A module that is launched nowhere: a GPU holds fewer programs the deeper the pipeline is, up to a depth."""

    def __init__(self, fits: int = 9, pages: int = 512) -> None:
        self.plan, self.deepest, self.pages, self.schedules = PLAN, fits, pages, Schedules(None, "")
        self.settings: dict[Any, Any] = {("decode", None): (3, None)}
        self.decode_warps: tuple[int, ...] = (1,)
        self.launched: list[Schedule | None] = []

    def launch(self, schedule: Schedule | None) -> None:
        self.launched.append(schedule)
        if schedule is not None:
            fits = schedule.stages <= self.deepest or schedule.stages == 3
            self.settings["decode", schedule.stages] = (schedule.stages if fits else 3, None)

    def by_model(self, programs: int, longest: int) -> Schedule:
        return Schedule(self.ranked(programs, longest)[0], 3, 1)

    def fits(self, depth: int) -> bool:
        return bool(self.settings["decode", depth][0] == depth)

    def ranked(self, programs: int, longest: int, depth: int | None = None) -> tuple[int, ...]:
        return ranked(Work(programs, self.pages, 64), Room(132, 24 // (depth or 3)))

    def filling(self, programs: int, longest: int, depth: int | None = None) -> tuple[int, ...]:
        return filling(Work(programs, self.pages, 64), Room(132, 24 // (depth or 3)))


def test_the_models_own_is_tried_first_then_its_next_ones_and_another_depth() -> None:
    module: Any = Launched()
    found = tuning.candidates(module, 64, 32768, module.launch)
    own = module.ranked(64, 32768)
    of_model = [*(Schedule(splits, 3, 1) for splits in own[:4]), Schedule(24, 2, 1)]
    assert found[: tuning.MOST] == of_model and own[0] == 16
    rest = [Schedule(splits, depth, 1) for depth in (3, 4) for splits in module.filling(64, 32768, depth)]
    rest += [Schedule(splits, depth, 1) for depth in (3, 4) for splits in (16, 8)]
    assert found[tuning.MOST :] == [one for one in dict.fromkeys(rest) if one not in of_model] != []
    assert module.launched == [None, Schedule(16, 2, 1), Schedule(16, 4, 1)]  # no more is compiled than is timed


def test_what_does_not_fit_is_not_tried() -> None:
    module: Any = Launched(fits=0)
    found = tuning.candidates(module, 64, 32768, module.launch)
    assert {one.stages for one in found[: tuning.MOST]} == {3} and len({*found[: tuning.MOST]}) == tuning.MOST
    assert {*found[tuning.MOST :]} == {Schedule(splits, 3, 1) for splits in module.filling(64, 32768)} - {
        *found[: tuning.MOST]
    }


def test_a_short_sequence_has_few() -> None:
    """All of its programs and half of them, at the model's depth and one deeper; with twice the warps, too, where a
    program has use for them."""
    module: Any = Launched(pages=2)
    few = [Schedule(2, 3, 1), Schedule(1, 3, 1), Schedule(2, 2, 1), Schedule(2, 1, 1)]
    few += [Schedule(2, 4, 1), Schedule(1, 4, 1)]
    assert tuning.candidates(module, 64, 100, module.launch) == few
    module.decode_warps = 1, 2
    more = [Schedule(splits, depth, 2) for depth in (3, 4) for splits in (2, 1)]
    assert tuning.candidates(module, 64, 100, module.launch) == few + more


def test_every_candidate_is_timed_under_itself_and_the_module_left_as_it_was() -> None:
    module: Any = Launched()
    module.schedules.best[AT] = BEST
    under: list[Schedule | None] = []

    def call() -> None:
        under.append(module.schedules.best.get(AT))
        module.launch(under[-1])

    clock = ListedClock([5.0, 4.0, 3.0, 4.0, 6.0] + [5.0] * 8)
    found = tuning.timed_schedules(module, AT, 64, 32768, call, clock)
    assert list(found.values()) == clock.seconds_of and under[-len(found) :] == list(found) and under[0] is None
    assert tuning.fastest(found) == list(found)[2] and module.schedules.best == {AT: BEST}
    with pytest.raises(ZeroDivisionError):
        tuning.timed_schedules(module, AT, 64, 32768, lambda: 1 / 0, clock)
    assert module.schedules.best == {AT: BEST}


def test_a_schedule_that_is_faster_by_chance_is_not_kept() -> None:
    model, other = Schedule(16, 3, 1), Schedule(24, 3, 1)
    assert tuning.fastest({model: 10.0, other: 9.95}) == model
    assert tuning.fastest({model: 10.0, other: 9.8}) == other


# -- the command -----------------------------------------------------------------------------------------------------


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for module in (schedules, tuning):
        monkeypatch.setattr(module, "this_card", lambda: None)
    assert run(["tune", "token4"]) == 2
    said = capsys.readouterr()
    assert not said.out and said.err.startswith("kvdsl: tune: schedules are timed on a GPU, and there is none here")
    with pytest.raises(BackendError, match="timed on a GPU"):
        kvdsl.tune(token4, SHAPE)
    assert run(["show", "token4", "--stage", "plan"]) == 0
    shown = capsys.readouterr().out
    assert "schedule of decode: by the model of the GPU" in shown and "1 warps, 2 of short sequences" in shown
    assert "there is none" in doctor.report()["schedules"]


def test_tiers_are_refused() -> None:
    with pytest.raises(SchemeError, match="tune one without tiers"):
        kvdsl.tune(h2o, SHAPE)


def test_the_command_tells_what_was_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A row a scheme, a layer's scheme of its own, and a size; a size that memory does not hold costs no other row."""
    asked: list[tuple[str, int, int]] = []

    def tune(scheme: kvdsl.Scheme, shape: Shape, *, batch: int, tokens: int) -> tuning.Tuned:
        asked.append((scheme.hash, batch, tokens))
        if batch == 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate everything")
        model, other = Schedule(16, 3, 1), BEST
        seconds = {model: 2e-5, other: 1.6e-5}
        return tuning.Tuned(scheme, shape, CARD, Bucket.of(batch, tokens), seconds, other, Path("file.json"))

    monkeypatch.setattr(tuning, "tune", tune)
    monkeypatch.setattr(tuning, "this_card", lambda: CARD)
    assert run(["tune", "token4", "kvtuner", "--batch", "1", "--batch", "8", "--tokens", "4096", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["results"]
    layered = {one.hash for _, one in ALL["kvtuner"].layers} | {ALL["kvtuner"].hash, token4.hash}
    assert {hash_ for hash_, *_ in asked} == layered and len(asked) == len(rows) == 2 * len(layered)
    assert rows[0]["best"] == {"splits": 24, "stages": 2, "warps": 1} and rows[0]["gain"] == pytest.approx(1.25)
    assert rows[1]["failed"] == "CUDA out of memory"
    told = "\n".join(tuning.told(rows[:2]))
    assert "16.0  kept" in told and "20.0  the model's" in told and "failed: CUDA out" in told and "file.json" in told


def test_kernels_that_are_built_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    path = store.keep("token4", PLAN, "triton", TEXT)
    assert codegen.bind(PLAN, "triton", path, TEXT).schedule == "model"
    kept()
    module = codegen.bind(PLAN, "triton", path, TEXT)
    assert module.schedule == f"tuned on {CARD}" and module.schedules.best == {AT: BEST}  # type: ignore[attr-defined]
    assert module.schedule_for(6, 24000) == module.schedule and module.schedule_for(1, 24000) == "model"
    plain = codegen.build(token4, SHAPE, "torch")
    assert plain.schedule == plain.schedule_for(8, 32768) == "torch"
