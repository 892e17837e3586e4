"""Triton and this package agree on who is interpreted."""

from __future__ import annotations

import pytest

from kvdsl.interpreting import INTERPRETER, interpreted

WORDS = ("1", "true", "TRUE", "on", "Yes", "y", "0", "false", "off", "no", "2", "")


@pytest.mark.parametrize("word", WORDS)
def test_every_word_means_what_it_means_to_triton(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    monkeypatch.setenv(INTERPRETER, word)
    assert interpreted() == knobs.runtime.interpret
