"""`kvdsl sweep` and `kvdsl recommend` on a tiny model in a folder: documents, tables, processes, Ray, refusals."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from kvdsl.codegen import sweep_engines
from kvdsl.codegen.cli import run
from kvdsl.evaluation import Settings
from kvdsl.registry import load
from kvdsl.sweeping.results import MEASURES

Captured = pytest.CaptureFixture[str]
TEXT = tiny.words(60, "\n")
FEW = ["--windows", "2", "--context", "70", "--score", "6", "--chunk", "3", "--no-compile"]
SHORT = Settings(tasks=("perplexity",), windows=1, context=70, score=6, chunk=3, sizes=(64,))


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The options that name a model and a text."""
    text = tmp_path_factory.mktemp("text") / "some.txt"
    text.write_text(TEXT)
    return ["--model", tiny.saved("llama", tmp_path_factory.mktemp("model")), "--text", str(text)]


@pytest.fixture
def grid(tmp_path: Path) -> str:
    path = tmp_path / "grid.toml"
    path.write_text('base = "token2"\nbeside = ["bitdecoding4"]\n[axes]\nbits = [2, 4]\nkeys.scale.tokens = [1, 32]\n')
    return str(path)


def document(captured: Captured, *arguments: str) -> Any:
    captured.readouterr()
    assert run([*arguments, "--json"]) == 0
    return json.loads(captured.readouterr().out)


def refused(captured: Captured, *arguments: str) -> str:
    captured.readouterr()
    assert run(arguments) == 2
    said = captured.readouterr()
    assert not said.out and said.err.startswith("kvdsl: ") and said.err.count("\n") == 1
    return said.err


def nothing_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on this process measures no row itself."""

    def measured(*_: Any) -> None:
        raise AssertionError("others were to measure this")

    monkeypatch.setattr("kvdsl.evaluation.run.Run._row", measured)


def timeless(found: Any) -> Any:
    for one in found["members"]:
        one["seconds"] = 0
    return {**found, "path": None}


def test_the_document_of_a_sweep_has_what_scripts_read(asked: list[str], grid: str, capsys: Captured) -> None:
    found = document(capsys, "sweep", grid, *asked, *FEW)
    assert {"model", "text", "settings", "shape", "layers", "versions", "gpu", "tokens", "batch"} <= found.keys()
    assert {"measures", "members", "left_out", "front", "path"} <= found.keys()
    assert [one["scheme"] for one in found["members"]] == [f"token2 bits={b} keys.scale.tokens=1" for b in (2, 4)]
    for one in found["members"]:
        assert set(one) == {"scheme", "hash", "axes", *MEASURES} and one["kl"] > 0 and one["microseconds"] > 0
    assert found["members"][0]["axes"] == {"bits": "2", "keys.scale.tokens": "1"}
    why = {one["scheme"]: one["why"] for one in found["left_out"]}
    assert "must wait until it is full; add recent=Recent(32)" in why["token2 bits=2 keys.scale.tokens=32"]
    assert "groups of 128 channels" in why["bitdecoding4"] and len(why) == 3
    assert set(found["front"]) == {"bits", "time"} and found["front"]["bits"][0] == found["members"][0]["scheme"]


def test_a_sweep_is_told_and_kept_and_recommended_of(
    asked: list[str], grid: str, tmp_path: Path, capsys: Captured
) -> None:
    out, spec = tmp_path / "some.sqlite", tmp_path / "best.toml"
    capsys.readouterr()
    assert run(["sweep", grid, *asked, *FEW, "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert all(word in told for word in ("token2 bits=2", "KL", "front", "bits, time", "left out  ", "results   "))
    best = document(capsys, "recommend", "--bits", "3", "--from", str(out), "--out", str(spec))
    assert {"budget", "scheme", "hash", "spec", "why", "beside", "looked_at", "left_out", "path", "kl"} <= best.keys()
    assert best["scheme"] == "token2 bits=2 keys.scale.tokens=1" and best["budget_bits"] <= 3 == best["budget"]
    assert load(spec).hash == best["hash"] and best["path"] == str(spec) and spec.read_text() == best["spec"]
    assert [one["role"] for one in best["beside"]] == ["beyond the budget"]
    capsys.readouterr()
    assert run(["recommend", "--bits", "5", "--from", str(out)]) == 0
    told = capsys.readouterr().out
    assert all(word in told for word in ("named", "next best", "cheaper", "why       ", "both = {"))


def test_axes_may_stand_on_the_command_line(asked: list[str], capsys: Captured) -> None:
    found = document(capsys, "sweep", "token2", "--axis", "bits=2,4", "--sample", "1", *asked, *FEW)
    assert len(found["members"]) == 1 and found["members"][0]["axes"].keys() == {"bits"}


def test_processes_come_to_the_same(
    asked: list[str], grid: str, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "some.sqlite"
    alone = document(capsys, "sweep", grid, *asked, *FEW)
    nothing_here(monkeypatch)
    shared = document(capsys, "sweep", grid, *asked, *FEW, "--workers", "2", "--out", str(out))
    assert timeless(shared) == timeless(alone)
    lines = (tmp_path / "some.sqlite.rows" / "rows.jsonl").read_text().splitlines()
    assert len({json.loads(line)["key"] for line in lines}) == len(lines) == 2 * 3


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed: pip install 'kvdsl[ray]'")
def test_a_cluster_comes_to_the_same(
    asked: list[str], grid: str, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    out = tmp_path / "some.sqlite"
    alone = document(capsys, "sweep", grid, *asked, *FEW)
    monkeypatch.setattr("kvdsl.codegen.sweep_engines.SHARE", 1)
    nothing_here(monkeypatch)
    shared = document(capsys, "sweep", grid, *asked, *FEW, "--engine", "ray", "--out", str(out))
    assert timeless(shared) == timeless(alone)
    lines = [json.loads(line) for line in (tmp_path / "some.sqlite.rows" / "rows.jsonl").read_text().splitlines()]
    assert len({line["key"] for line in lines}) == len(lines) == 2 * 3


def test_a_task_gives_the_rows_that_are_not_known(asked: list[str]) -> None:
    specs = {"token2": load("token2").to_json()}
    told: dict[str, Any] = {"schemes": specs, "model": asked[1], "text": TEXT, "settings": SHORT.to_dict()}
    told |= {"backend": None, "device": None}
    first = sweep_engines.rows_of(told, "")
    assert first.count("\n") == 2 and sweep_engines.rows_of(told, first) == ""
    assert sweep_engines.rows_of(told, first.splitlines()[0]) == first.splitlines(keepends=True)[1]


def test_an_interruption_says_what_is_kept(
    asked: list[str], tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kvdsl.evaluation.run.evaluate", stopped)
    capsys.readouterr()
    out = tmp_path / "some.sqlite"
    few = ["--bits", "4", "--among", "token2"]
    monkeypatch.setattr("kvdsl.codegen.recommending.rounds", lambda seed: (SHORT,) * 3)
    for command in (["sweep", "token2", *asked, *FEW, "--out"], ["recommend", *few, *asked, "--keep"]):
        assert run([*command, str(out)]) == 130
        assert f"what was measured is in {out} and {out}.rows; the same command goes on" in capsys.readouterr().err
        out.unlink()


def test_wrong_use_is_told_in_one_line(asked: list[str], tmp_path: Path, capsys: Captured) -> None:
    empty = tmp_path / "empty.toml"
    empty.write_text("bits = [2]\n")
    for arguments, message in (
        (["sweep", "nonsense", *asked], "nonsense"),
        (["sweep", str(empty), *asked], "grid: it has no field 'bits'"),
        (["sweep", "token2", "--axis", "bits", *asked], "axis: 'bits' is none; give a place and its values"),
        (["sweep", "token2", "--axis", "bit=2", *asked], "axes: no base has a place 'bit'"),
        (["sweep", "token2", "--axis", "keys.transform=hadamrd", *asked], "use hadamard"),
        (["sweep", "token2", "--engine", "dask", *asked], "engine: 'dask' is none of local, ray"),
        (["sweep", "token2", "--gpu", "abacus", *asked], "gpu: 'abacus' is none of"),
        (["sweep", "token2", *asked], "context: a prompt of perplexity has 1025 tokens"),
        (["recommend", "--bits", "3"], "recommend: give --model, or --from with the file of a sweep"),
        (["recommend", "--bits", "0.5", *asked], "takes 0.5 bits or fewer; the fewest are"),
        (["recommend", "--bits", "3", "--among", "token4", *asked], "the fewest are 5.000, of token4; give more"),
        (
            ["recommend", "--bits", "3", "--from", str(tmp_path / "none")],
            "is no file; give one that `kvdsl sweep --out`",
        ),
        (["recommend", "--bits", "3", "--out", "x.txt", *asked], "out: 'x.txt' is no .toml or .json file"),
    ):
        assert message in refused(capsys, *arguments)
