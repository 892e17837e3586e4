"""Merges that map, by programs of one row and of many, interpreted."""

from __future__ import annotations

import pytest
from merge_cases import SCHEMES, alike


@pytest.mark.parametrize("name", SCHEMES)
def test_rows_that_share_a_program_are_merged_as_if_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    alike(name, monkeypatch, "cpu")
