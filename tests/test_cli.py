"""The command line: what it prints, its documents, its exit status, its one message for what is wrong."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import kvdsl
from kvdsl.codegen import answer, checking
from kvdsl.codegen.cli import app, run
from kvdsl.codegen.show import STAGES
from kvdsl.segments import parts

SPEC = "from kvdsl import Scheme, Store, Uniform, per_token\nmine = Scheme(both=Store(Uniform(6), scale=per_token()))\n"
Captured = pytest.CaptureFixture[str]


def asked(captured: Captured, *arguments: str, status: int = 0) -> str:
    """Standard output of a command that ends with `status`; nothing is on stderr when all went well."""
    assert run(arguments) == status
    said = captured.readouterr()
    assert status or not said.err
    return said.out


def document(captured: Captured, *arguments: str, status: int = 0) -> Any:
    return json.loads(asked(captured, *arguments, "--json", status=status))


def refused(captured: Captured, *arguments: str) -> str:
    """The message of a command that was used wrongly."""
    assert run(arguments) == 2
    said = captured.readouterr()
    assert not said.out and "Traceback" not in said.err and said.err.startswith("kvdsl: ")
    return said.err.removeprefix("kvdsl: ").rstrip("\n")


def test_list_says_what_the_accounting_says(capsys: Captured) -> None:
    found = document(capsys, "list")
    assert [row["name"] for row in found] == list(kvdsl.names())
    assert found[2] == {
        "name": "kivi2",
        "system": "KIVI",
        "source": "arXiv 2402.02750, section 3",
        "bits": {"keys": 3.0, "values": 3.0, "mean": 3.0},
    }
    table = asked(capsys, "list").splitlines()
    assert len(table) == 1 + len(found) and all(line == line.rstrip() for line in table)


@pytest.mark.parametrize("name", kvdsl.names())
def test_show_shows_every_stage_of_every_scheme(name: str, capsys: Captured) -> None:
    stages = document(capsys, "show", name)["stages"]
    assert list(stages) == list(STAGES)
    assert kvdsl.Scheme.from_dict(stages["scheme"]["tree"]) == kvdsl.load(name)
    assert stages["cost"]["mean"] == kvdsl.bits(kvdsl.load(name)).mean
    for place in parts(kvdsl.load(name)):
        layout, plan, source = (stages[s][place] if place else stages[s] for s in ("layout", "plan", "source"))
        assert sum(row["bytes"] for row in layout["sections"] if not row["shared"]) == layout["head_bytes"]
        assert {"decode", "extend", "scores", "merge"} <= {kernel["kernel"] for kernel in plan["kernels"]}
        ast.parse(source["text"])
    whole = asked(capsys, "show", name)
    assert all(f"{name}: {stage}" in whole for stage in STAGES if stage != "source")


def test_the_normal_form_reads_like_the_paper(capsys: Captured) -> None:
    told = asked(capsys, "show", "kivi2", "--stage", "normal-form")
    assert "k[t, d] = c[t, d]*s[b, d] + z[b, d]" in told
    assert "q . k[t] = sum_d q[d]*z[b, d] + sum_d q[d]*s[b, d]*c[t, d]" in told
    assert "s[b, d] is multiplied onto the query, once per tile of tokens that share it" in told
    assert "[symbolic]" in told and "[exhaustive (4 cases)]" in told


def test_the_layout_draws_the_bits_of_a_word(capsys: Captured) -> None:
    told = asked(capsys, "show", "kivi4", "--stage", "layout")
    assert "15..12| 11..8 |  7..4 |  3..0" in told and "96+x |  64+x |  32+x |  0+x" in told


def test_show_takes_the_shape(capsys: Captured) -> None:
    found = document(capsys, "show", "kivi2", "--stage", "layout", "--head-dim", "64", "--kv-heads", "2")
    assert found["stages"]["layout"]["kv_heads"] == 2 and list(found["stages"]) == ["layout"]
    cost = document(capsys, "show", "kivi2", "--stage", "cost", "--tokens", "256")["stages"]["cost"]
    assert cost["keys"]["window"] == 0 and cost["values"]["window"] == 8.0


def test_a_name_is_whatever_load_takes(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "six.py").write_text(SPEC)
    (tmp_path / "six.toml").write_text(kvdsl.load("kivi2").with_(bits=6).to_toml())
    assert document(capsys, "show", f"{tmp_path}/six.py:mine", "--stage", "scheme")["scheme"] == "mine"
    assert document(capsys, "show", f"{tmp_path}/six.toml", "--stage", "scheme")["scheme"] == "six"
    assert document(capsys, "show", "kvdsl.schemes.kivi:kivi4", "--stage", "scheme")["scheme"] == "kivi4"


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_emit_writes_what_build_would_run(backend: str, tmp_path: Path, capsys: Captured) -> None:
    from kvdsl.codegen import render
    from kvdsl.codegen.plan import plan_for

    path = Path(asked(capsys, "emit", "kivi2", "--out", str(tmp_path / "new"), "--backend", backend).strip())
    plan = plan_for(kvdsl.load("kivi2"), kvdsl.Shape(128, 8, 32))
    assert path.name == f"kivi2_{backend}.py" and path.read_text() == render(plan, backend, "kivi2")


def test_compile_gives_figures_without_a_gpu(capsys: Captured) -> None:
    pytest.importorskip("triton")
    found = document(capsys, "compile", "int8_token_head", "--arch", "sm_90", "--head-dim", "64")["kernels"]
    keys = {
        "kernel", "arch", "registers", "spills", "shared_bytes", "loop_instructions", "loop_packed_bytes",
        "instructions_per_byte", "predicted_share",
    }  # fmt: skip
    assert all(keys <= row.keys() and row["arch"] == "sm_90" for row in found)
    decode = next(row for row in found if row["kernel"] == "decode")
    assert decode["registers"] > 0 and decode["spills"] == 0 and 0 < decode["predicted_share"] < 1
    assert decode["mma_ratio"] == pytest.approx(1, abs=0.02) and decode["slots"] < 10
    assert decode["shares"].keys() == {"H100", "H200"} and sum(decode["work"].values()) == pytest.approx(1)
    assert decode["loads"]["LDG.32"] == 1 and decode["loads"]["LDGSTS.128"] == decode["wide_loads"]
    assert sum(decode["counts"].values()) == decode["loop_instructions"]
    pack = next(row for row in found if row["kernel"] == "pack_keys")
    assert pack["predicted_share"] is pack["ideal_mma"] is None and pack["loads"] and pack["instructions"] > 0
    assert sum(pack["counts"].values()) == pack["instructions"] >= pack["straight_instructions"] > 0
    assert (pack["tokens"], pack["elements"], pack["bytes_read"]) == (32, 32 * 64, 32 * 64 * 2)
    assert pack["bytes_written"] == 32 * (64 + 4) and 0 < pack["instructions_per_element"] < 40


def test_doctor_says_what_is_live_and_why(capsys: Captured) -> None:
    found = document(capsys, "doctor")
    assert found["versions"]["torch"] and {path["path"] for path in found["paths"]} >= {
        "backend torch",
        "backend triton",
    }
    assert all(path["why"] for path in found["paths"])
    assert "torch" in asked(capsys, "doctor")


# -- check -----------------------------------------------------------------------------------------------------------


def test_check_runs_the_laws(capsys: Captured) -> None:
    found = document(capsys, "check", "token4", "--examples", "1", "--seed", "3", "--backend", "torch")["results"]
    assert [row["scheme"] for row in found] == ["token4"] and found[0]["passed"]
    assert all(law.keys() == {"law", "place", "examples", "passed", "failure"} for law in found[0]["laws"])
    assert "token4: " in asked(capsys, "check", "token4", "--examples", "1", "--backend", "torch")


def test_a_broken_law_is_told_in_full_and_ends_with_status_1(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    failure = "codes[0]: 3, wanted 2\nin Case(...)"
    broken = {"law": "pages_hold", "place": "layers[2]", "examples": 3, "passed": False, "failure": failure}
    result = {"scheme": "kivi2", "passed": False, "laws": [broken]}
    monkeypatch.setattr(checking, "results", lambda *_, **__: [result])
    assert document(capsys, "check", "kivi2", status=1) == {"results": [result]}
    told = asked(capsys, "check", "kivi2", status=1)
    assert "1 of 1 laws broken" in told and "layers[2]: pages_hold" in told and "codes[0]: 3, wanted 2" in told


# -- what is wrong ---------------------------------------------------------------------------------------------------

WRONG = {
    (): "Missing command; see `kvdsl --help`",
    ("shw",): "No such command 'shw'",
    ("list", "x"): "Got unexpected extra argument",
    ("show",): "Missing argument 'NAME'",
    ("show", "kivi9"): "name: 'kivi9' is no scheme; use kivi4",
    ("show", "nowhere.py:X"): "name: 'nowhere.py' is no file",
    ("show", "kivi2", "--stage", "middle"): "Invalid value for '--stage'",
    ("show", "kivi2", "--head-dim", "x"): "Invalid value for '--head-dim'",
    ("show", "kivi2", "--head-dim", "100"): "shape.head_dim: 100 is no multiple of 8",
    ("show", "kivi2", "--tokens", "0"): "Invalid value for '--tokens'",
    ("emit", "kivi2"): "Missing option '--out'",
    ("emit", "kivi2", "--out", "/proc/none"): "/proc/none: ",
    ("compile", "kivi2", "--arch", "sm_75"): "architecture 'sm_75' is not known here; take one of sm_80",
    ("check",): "check: name one or more schemes, or give --all",
    ("check", "kivi2", "--all"): "check: name one or more schemes, or give --all",
    ("check", "kivi9"): "name: 'kivi9' is no scheme",
    ("check", "kivi2", "--examples", "0"): "Invalid value for '--examples'",
    ("tune",): "Missing argument 'NAME...'",
    ("tune", "kivi9"): "name: 'kivi9' is no scheme",
    ("tune", "kivi2", "--batch", "0"): "Invalid value for '--batch'",
    ("generate", "kivi2", "--model", "x"): "generate: give either --prompt TEXT or --file F",
    ("generate", "kivi2", "--model", "/none", "--prompt", "a"): "model '/none': there is no such file or folder",
    ("generate", "kivi2", "--model", "x", "--file", "/none"): "/none: No such file or directory",
    ("calibrate", "int8_tensor", "--model", "/none", "--text", __file__, "--out", "x"): "model '/none'",
    (
        "calibrate",
        "kivi2",
        "--model",
        "/none",
        "--text",
        __file__,
        "--out",
        "x",
    ): "scheme: it takes no number from data",
}


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_wrong_use_gets_one_message_and_status_2(arguments: tuple[str, ...], capsys: Captured) -> None:
    assert refused(capsys, *arguments).startswith(WRONG[arguments])


def test_a_faulty_spec_tells_every_fault(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "bad.py").write_text(
        SPEC.replace("Uniform(6)", "Uniform(60)").replace("per_token()", "per_token(range='x')")
    )
    said = refused(capsys, "show", f"{tmp_path}/bad.py:mine")
    assert "bits: 60" in said and "scale.range: 'x'" in said


def test_what_a_users_own_file_raises_is_told_in_one_line(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "bad.py").write_text("1 / 0\n")
    assert refused(capsys, "show", f"{tmp_path}/bad.py") == f"{tmp_path}/bad.py: ZeroDivisionError: division by zero"


def test_a_file_that_is_no_text_is_refused(tmp_path: Path, capsys: Captured) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"\xff\xfe\xfa")
    assert "no text in UTF-8" in refused(capsys, "generate", "kivi2", "--model", "x", "--file", str(path))


# -- as a process ----------------------------------------------------------------------------------------------------


def test_the_command_is_a_module_too(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "kvdsl", "list", "--json"], capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout) and not done.stderr


def test_a_reader_may_stop_reading() -> None:
    command = f"{sys.executable} -m kvdsl show kivi2 --stage source | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout.startswith('"""kivi2') and not done.stderr


def test_every_command_has_a_help_text(capsys: Captured) -> None:
    commands = [command.name or command.callback.__name__ for command in app.registered_commands]  # type: ignore[union-attr]
    assert commands == [
        "list",
        "show",
        "emit",
        "compile",
        "check",
        "study",
        "bench",
        "tune",
        "generate",
        "eval",
        "report",
        "sweep",
        "recommend",
        "calibrate",
        "search",
        "doctor",
    ]
    for command in commands:
        assert "Usage: kvdsl" in asked(capsys, command, "--help")


def test_a_document_holds_no_infinity(capsys: Captured) -> None:
    answer.document({"a": float("inf"), "b": [float("nan"), 1.5]})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.5]}


def test_columns_line_up() -> None:
    assert answer.columns([("a", "10", "x"), ("bcd", "9", "")], right=(1,)) == ["a    10  x", "bcd   9"]
