"""Fronts, and a scheme within a budget: who is looked at, in which rounds, who is named, what a stopped one keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sweep_cases
import tiny
from sweep_cases import SMALL, of

import kvdsl
from kvdsl import Uniform
from kvdsl.codegen import recommending
from kvdsl.registry import load
from kvdsl.schemes import token2
from kvdsl.shape import Shape
from kvdsl.sweeping.choice import Beside, Candidate, candidates, halved, named
from kvdsl.sweeping.file import SweepFile
from kvdsl.sweeping.front import front
from kvdsl.sweeping.grid import LeftOut, Member
from kvdsl.sweeping.results import Figured

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ["token2", "token3", "turboquant2", "token4", "bitdecoding2"]
ROUNDS = (SMALL.with_(windows=1), SMALL, SMALL.with_(seed=1))


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
    options: dict[str, Any] = {"bits": 4.0, "among": NAMES, "text": tiny.TEXT, "settings": ROUNDS}
    found = kvdsl.recommend(small, out=tmp_path / "x.toml", **options)
    right = kvdsl.evaluate(["token2", "token3", "turboquant2"], small, text=tiny.TEXT, settings=ROUNDS[2])
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


def test_a_stopped_choice_goes_on_and_measures_nothing_twice(
    small: tiny.Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured, path = sweep_cases.Measured(monkeypatch), tmp_path / "some.sqlite"
    options: dict[str, Any] = {"bits": 4.0, "among": NAMES, "text": tiny.TEXT, "settings": ROUNDS}
    right = kvdsl.recommend(small, **options)
    whole, measured.rows, measured.stop = measured.rows, 0, 7
    with pytest.raises(KeyboardInterrupt):
        kvdsl.recommend(small, keep=path, **options)
    assert len(NAMES) - 1 < measured.rows == 7 < whole  # all of the first round, some of the second
    measured.stop = None
    found = kvdsl.recommend(small, keep=path, **options)
    assert measured.rows == whole and found.scheme == right.scheme and found.why == right.why
    again = kvdsl.recommend(small, keep=path, **options)
    assert measured.rows == whole and again.to_dict() == found.to_dict()
    kept = SweepFile(path).read()  # is a sweep's: what was measured last, with times
    assert {one.name for one in kept.members} == {one.figured.name for one in (found.chosen, *found.beside)}
    assert all(one.figures["microseconds"] for one in kept.members)
    assert kvdsl.recommend(None, bits=4.0, sweep=path).chosen.figured == found.chosen.figured
    with pytest.raises(ValueError, match=r"keep: .* is of another sweep, its settings {'windows': 2} and not"):
        kvdsl.recommend(small, keep=path, **{**options, "settings": (*ROUNDS[:2], SMALL.with_(seed=1, windows=3))})
    with pytest.raises(ValueError, match="keep: of a sweep's file nothing is measured"):
        kvdsl.recommend(None, bits=4.0, sweep=path, keep=path)


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
