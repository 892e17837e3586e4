"""What `kvdsl bench` counts and says; what it times is no test's business.  The page of figures is up to date."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch

from kvdsl.bench import Size, Times, read_bytes
from kvdsl.codegen import build
from kvdsl.codegen.cli import run
from kvdsl.errors import ShapeError
from kvdsl.quantized_cache import QuantizedCache
from kvdsl.schemes import ALL
from kvdsl.shape import Shape

ROOT = Path(__file__).resolve().parent.parent


def test_the_page_of_figures_is_of_the_results() -> None:
    """When this fails, `python benchmarks/page.py > docs/speed.md` writes it anew."""
    made = runpy.run_path(str(ROOT / "benchmarks" / "page.py"))
    assert (ROOT / "docs" / "speed.md").read_text(encoding="utf-8") == made["page"](made["documents"]())


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


def test_on_a_cpu_there_are_ratios_alone(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("has a GPU")
    assert run(["bench", "token4", "--shape", "1x2x100", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["device"] == "cpu" and found["read_limit_gbps"] is None and "nothing about a GPU" in found["note"]
    (row,) = found["results"]
    assert row["us"] is row["gbps"] is row["share"] is None
    assert row["speedup_fp16"] > 0 and row["speedup_unpack"] > 0
    assert run(["bench", "token4", "--shape", "1x2x100"]) == 0
    assert "as ratios" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["8x8", "8x8x0", "8x8xmany", ""])
def test_a_shape_that_is_none_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ShapeError, match="give BATCHxHEADSxTOKENS"):
        Size.parse(text)
    assert run(["bench", "token4", "--shape", text]) == 2
    assert "BATCHxHEADSxTOKENS" in capsys.readouterr().err


def test_the_median_and_the_quantiles_are_of_the_samples() -> None:
    times = Times((3.0, 1.0, 2.0, 5.0, 4.0))
    assert (times.median, times.at(0.0), times.at(0.25), times.at(1.0)) == (3.0, 1.0, 2.0, 5.0)
