"""The kernel that only reads: as wide as memory allows on every GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvdsl.codegen.aot import compile_in_child
from kvdsl.codegen.front_end import ARCHES
from kvdsl.codegen.launch import Launch
from kvdsl.codegen.limits import WARPS, WORD, WORDS, ReadLimit, readers

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parent.parent


def test_it_loads_sixteen_bytes_a_lane_and_nothing_else() -> None:
    kinds = (("words_ptr", "*i32"), ("out_ptr", "*i32"), ("rounds", "i32"), ("WORDS", "constexpr"))
    launch = Launch(
        "read_words", kinds, (("WORDS", WORDS),), warps=WARPS, loop_packed_bytes=WORD * WORDS,
        aligned=("words_ptr", "out_ptr"),
    )  # fmt: skip
    source = ROOT / "codegen" / "device_read.py"
    for kernel in compile_in_child(source, [launch], ARCHES, cache_folder=ROOT / "build" / "aot"):
        assert kernel.loads == {"LDG.128": WORDS * WORD // (WARPS * 32 * 16)} and not kernel.spills


def test_every_reader_reads_nearly_all_words() -> None:
    """What does not fill a program is left out, and is not counted."""
    words = torch.zeros(100 * WORDS + 5, dtype=torch.int32)
    sizes = [size for size, _ in readers(words)]
    assert sizes == [len(words), len(words), 100 * WORDS, 100 * WORDS, 96 * WORDS]
    assert [size for size, _ in readers(words[:10])] == [10, 10]


def test_a_limit_is_measured_once_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    limit, asked = ReadLimit(torch.device("cpu"), None), list[int | None]()  # type: ignore[arg-type]

    def measured(nbytes: int | None) -> float:
        asked.append(nbytes)
        return 1.0

    monkeypatch.setattr(limit, "_measured", measured)
    assert [limit(None), limit(8), limit(None), limit(8)] == [1.0] * 4 and asked == [None, 8]
