"""What `kvdsl bench --plot` draws, and what it refuses to draw."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from kvdsl.codegen import bench_plot
from kvdsl.codegen.cli import run

SHAPE = {"shape": "8x8x131072"}
FOUND: dict[str, Any] = {
    "device": "GPU",
    "read_limit_gbps": 4000.0,
    "results": [
        SHAPE | {"scheme": "token4", "bits": 4.25, "gbps": 3600.0, "speedup_fp16": 3.3},
        SHAPE | {"scheme": "large", "failed": "CUDA out of memory"},
    ],
    "peers": [
        SHAPE | {"peer": "theirs", "bits": 8.0, "gbps": 2000.0, "speedup_fp16": None},
        SHAPE | {"peer": "absent", "bits": 8.0, "missing": "not installed"},
    ],
}


def test_a_plot_shows_every_scheme_and_peer(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [{"scheme": "token4", "gpu": "H200", "bits": 4.25, "share": 0.9, "gbps": 3960.0}]
    found = FOUND | {"predicted": rows}
    for name, beginning in (("a.svg", b"<?xml"), ("a.png", b"\x89PNG")):
        bench_plot.drawn(found, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(beginning)
    text = (tmp_path / "a.svg").read_text()
    for shown in ("token4", "theirs", "read limit", "predicted from machine code", "8x8x131072"):
        assert f"<!-- {shown} -->" in text
    assert "absent" not in text
    bench_plot.drawn({**found, "read_limit_gbps": None}, tmp_path / "cpu.svg")
    assert "nothing here was measured" in (tmp_path / "cpu.svg").read_text()


def test_a_plot_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, words in ((tmp_path / "x.gif", ".svg, .png, .pdf"), (tmp_path / "no" / "x.svg", "no folder")):
        assert run(["bench", "token4", "--plot", str(path)]) == 2
        assert words in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(["bench", "token4", "--plot", str(tmp_path / "x.svg")]) == 2
    assert "pip install 'kvdsl[plot]'" in capsys.readouterr().err
