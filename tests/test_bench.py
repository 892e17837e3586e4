"""What `kvdsl bench` counts and says; what it times is no test's business.  The page of figures is up to date."""

from __future__ import annotations

import io
import json
import runpy
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.table import Table

from kvdsl.bench import Size, Times, read_bytes
from kvdsl.codegen import build
from kvdsl.codegen.bench_told import told
from kvdsl.codegen.cli import run
from kvdsl.codegen.roofline import CARDS
from kvdsl.errors import ShapeError
from kvdsl.quantized_cache import QuantizedCache
from kvdsl.schemes import ALL
from kvdsl.shape import Shape

ROOT = Path(__file__).resolve().parent.parent


def test_the_page_of_figures_is_of_the_results() -> None:
    """When this fails, `python benchmarks/page.py > docs/speed.md` writes it anew."""
    made = runpy.run_path(str(ROOT / "benchmarks" / "page.py"))
    assert (ROOT / "docs" / "speed.md").read_text(encoding="utf-8") == made["whole"]()


def test_the_plots_are_of_the_results() -> None:
    """When this fails, `python benchmarks/plots.py` draws them anew.  Each file says what it was drawn from."""
    pytest.importorskip("matplotlib")
    made = runpy.run_path(str(ROOT / "benchmarks" / "plots.py"))
    found = made["devices"]()
    assert {made["path"](device) for device in found} == {*(ROOT / "docs").glob("speed_*.svg")}
    for device, times in found.items():
        assert made["digest"](times) in made["path"](device).read_text(encoding="utf-8")


def test_the_page_takes_newer_results_too() -> None:
    """What does not fit and what is missing is passed over; other systems have a table of their own."""
    made = runpy.run_path(str(ROOT / "benchmarks" / "page.py"))
    shape = {"shape": "1x8x1024"}
    row = shape | {"scheme": "token4", "us": 10.0, "us_fp16": 20.0, "gbps": 2000.0, "speedup_unpack": None}
    theirs = shape | {"peer": "theirs", "us": 40.0, "gbps": 1000.0, "speedup_fp16": 0.5, "bits": 8.0, "error": None}
    document = made["documents"]()[0] | {
        "read_limit_gbps": 4000.0,
        "results": [row, shape | {"scheme": "too_large", "failed": "CUDA out of memory"}],
        "peers": [theirs, shape | {"peer": "absent", "missing": "not installed"}],
    }
    text = made["page"]([document])
    assert "| `token4` | 10.0 (50%, 2.00) |  |" in text and "| theirs | 8.00 | 40.0 (25%, 0.50) | unchecked |" in text
    assert "too_large" not in text and "absent" not in text


def test_bytes_to_read_are_those_of_tokens_and_pages() -> None:
    """kivi4, 300 and 200 tokens: keys leave the window 128 at a time, values one by one; 5 bits a packed number, 16 an
    exact one, a page number for 64 tokens."""
    cache = QuantizedCache(build(ALL["kivi4"], Shape(64, 2, 4), backend="torch"), 2)
    numbers = torch.zeros(2, 2, 300, 64, dtype=torch.float16)
    cache.append(numbers, numbers, counts=(300, 200))
    packed = sum(sum(cache.packed(side)) for side in ("keys", "values"))
    assert 0 < packed < 2 * 500
    pages = 5 + 4
    assert read_bytes(cache) == packed * 2 * 64 * 5 // 8 + (2 * 500 - packed) * 2 * 64 * 2 + 4 * pages


def test_on_a_cpu_there_are_ratios_and_what_machine_code_predicts(capsys: pytest.CaptureFixture[str]) -> None:
    """No time of a CPU is told; each GPU of the table has a share, where Triton can compile."""
    if torch.cuda.is_available():
        pytest.skip("has a GPU")
    assert run(["bench", "token4", "--shape", "1x2x100", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["device"] == "cpu" and found["read_limit_gbps"] is None and "nothing about a GPU" in found["note"]
    (row,) = found["results"]
    assert {row[name] for name in ("us", "gbps", "share", "share_own", "us_hot")} == {None}
    assert row["speedup_fp16"] > 0 and row["speedup_unpack"] > 0
    assert row["speedup_peers"].keys() == {"SDPA fp16"} and row["error"] < 1e-3
    assert {row["us"] for row in found["peers"] if "missing" not in row} == {None}
    shown = "\n".join(map(plain, told(found)))
    assert "as ratios" in shown and "not installed: pip install flashinfer-python" in " ".join(shown.split())
    if "failed" not in found["predicted"][0]:
        assert [row["gpu"] for row in found["predicted"]] == [gpu.name for gpu in CARDS]
        assert all(0.5 < row["share"] < 1 for row in found["predicted"]) and "H200" in shown


def plain(table: Table) -> str:
    """What a terminal shows."""
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


@pytest.mark.parametrize("text", ["8x8", "8x8x0", "8x8xmany", ""])
def test_a_shape_that_is_none_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ShapeError, match="give BATCHxHEADSxTOKENS"):
        Size.parse(text)
    assert run(["bench", "token4", "--shape", text]) == 2
    assert "BATCHxHEADSxTOKENS" in capsys.readouterr().err


def test_the_median_and_the_quantiles_are_of_the_samples() -> None:
    times = Times((3.0, 1.0, 2.0, 5.0, 4.0))
    assert (times.median, times.at(0.0), times.at(0.25), times.at(1.0)) == (3.0, 1.0, 2.0, 5.0)
