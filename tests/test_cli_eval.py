"""`kvdsl eval` on a tiny model in a folder: its document, its tables, its files, what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny

from kvdsl.codegen import eval_workers, evaluating
from kvdsl.codegen.cli import run
from kvdsl.evaluation import Evaluation

Captured = pytest.CaptureFixture[str]
TEXT = tiny.words(60, "\n")
FEW = ["--windows", "2", "--context", "70", "--score", "6", "--chunk", "3", "--lengths", "340"]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The options that name a model and a text."""
    text = tmp_path_factory.mktemp("text") / "some.txt"
    text.write_text(TEXT)
    return ["--model", tiny.saved("llama", tmp_path_factory.mktemp("model")), "--text", str(text)]


def document(captured: Captured, *arguments: str) -> Any:
    assert run(["eval", *arguments, "--json"]) == 0
    return json.loads(captured.readouterr().out)


def refused(captured: Captured, *arguments: str) -> str:
    capsys = captured
    assert run(["eval", *arguments]) == 2
    said = capsys.readouterr()
    assert not said.out and said.err.startswith("kvdsl: ") and said.err.count("\n") == 1
    return said.err


def test_the_document_has_what_scripts_read(asked: list[str], capsys: Captured) -> None:
    capsys.readouterr()
    tasks = ["--tasks", "perplexity,passkey,needle"]
    found = document(capsys, "int8_token_head", "int4_token_head", *asked, *FEW, *tasks)
    assert found["text"] == "some.txt" and Path(asked[1]).name == found["model"]
    assert [one["scheme"] for one in found["results"]] == ["int8_token_head", "int4_token_head"]
    for one in found["results"]:
        assert {"scheme", "bits", "perplexity", "delta", "tasks"} <= one.keys()
        assert set(one["tasks"]) == {"perplexity", "passkey", "needle"} and 4 < one["bits"] < 10
        assert one["perplexity"] == one["tasks"]["perplexity"]["perplexity"] > 1
        assert one["backend"] == "torch" and one["reads"]["packed_calls"] > 0 == one["reads"]["fallbacks"]
        assert len(one["tasks"]["passkey"]["cells"]) == 3 and one["storage"]["sizes"]
    assert found["notes"][0].startswith("backend torch, model in float32; text some.txt, sha256 ")
    assert Evaluation.from_dict(found).to_dict() == found


def test_a_folder_keeps_rows_and_results(asked: list[str], tmp_path: Path, capsys: Captured) -> None:
    pytest.importorskip("matplotlib")
    capsys.readouterr()
    out = tmp_path / "new" / "folder"
    command = ["kivi2", *asked, *FEW, "--tasks", "perplexity", "--out", str(out)]
    assert run(["eval", *command]) == 0
    told = capsys.readouterr().out
    assert all(word in told for word in ("full precision", "kivi2", "perplexity", "KL", "bits, all bytes held", "note"))
    assert all(str(out / name) in told.replace("\n", "") for name in ("results.json", "report.html"))
    assert "</html>" in (out / "report.html").read_text()
    rows = (out / "rows.jsonl").read_text()
    found = document(capsys, *command)
    assert json.loads((out / "results.json").read_text()) == found and (out / "rows.jsonl").read_text() == rows


def test_results_are_kept_where_no_report_can_be_drawn(
    asked: list[str], tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    capsys.readouterr()
    assert run(["eval", "kivi2", *asked, *FEW, "--tasks", "perplexity", "--out", str(tmp_path), "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == json.loads((tmp_path / "results.json").read_text())
    assert said.err.startswith("kvdsl: no report is drawn: matplotlib is not installed; run: pip install 'kvdsl[plot]'")
    assert not (tmp_path / "report.html").exists()


def test_an_interruption_says_what_is_kept(
    asked: list[str], tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kvdsl.evaluation.run.evaluate", stopped)
    capsys.readouterr()
    assert run(["eval", "kivi2", *asked, "--out", str(tmp_path)]) == 130
    said = capsys.readouterr().err
    assert f"what was measured is in {tmp_path / 'rows.jsonl'}; the same command goes on from there" in said


def test_processes_share_schemes_and_come_to_the_same(asked: list[str], tmp_path: Path, capsys: Captured) -> None:
    capsys.readouterr()
    names = ["int8_token_head", "int4_token_head", "bitdecoding4"]  # which does not fit
    command = [*asked, *FEW, "--tasks", "perplexity"]
    alone = document(capsys, *names[:2], *command)
    assert "bitdecoding4" in refused(capsys, *names, *command, "--workers", "2", "--out", str(tmp_path))
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert len({json.loads(line)["key"] for line in lines}) == len(lines) == 2 * 3
    shared = document(capsys, *names[:2], *command, "--out", str(tmp_path))
    for one in (alone, shared):
        for result in one["results"]:
            result["seconds"] = 0
    assert shared == alone
    assert (tmp_path / "rows.jsonl").read_text().splitlines() == lines
    assert eval_workers.share(names, 2) == [["int8_token_head", "bitdecoding4"], ["int4_token_head"]]
    assert eval_workers.share(names, 9) == [[name] for name in names]
    assert eval_workers.repeated(model="m", text=None, full=True, seed=0) == ["--model", "m", "--full", "--seed", "0"]


def test_wrong_use_is_told_in_one_line(asked: list[str], tmp_path: Path, capsys: Captured) -> None:
    capsys.readouterr()
    for arguments, message in (
        ([*asked], "eval: name one or more schemes, or give --all"),
        (["kivi2", "--all", *asked], "eval: name one or more schemes, or give --all"),
        (["nonsense", *asked], "nonsense"),
        (["kivi2", *asked, "--tasks", "poetry"], "tasks: 'poetry' is none of perplexity, passkey, needle, copy"),
        (["kivi2", *asked, "--lengths", "a,b"], "lengths: 'a,b' is no list of whole numbers"),
        (["kivi2", *asked], "windows take 5 x 1025"),
        (["bitdecoding4", *asked, *FEW, "--tasks", "perplexity"], "groups of 128 channels do not divide head_dim 32"),
        (["kivi2", *asked[:2], "--text", str(tmp_path / "none.txt")], "none.txt"),
        (["kivi2", "--model", str(tmp_path), *asked[2:]], "holds no config.json"),
    ):
        assert message in refused(capsys, *arguments)


def test_texts_are_known_by_name() -> None:
    words, name = evaluating.named_text(Path("code"))
    assert name == "code" and "import argparse" in words or "class ArgumentParser" in words
