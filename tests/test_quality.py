"""docs/quality.md: it is what the figures make, of all shipped schemes, and tells why where theory does not hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import quality
import variants

from kvdsl.schemes import ALL

ROOT = Path(__file__).resolve().parent.parent


def test_the_page_is_of_the_figures() -> None:
    """When this fails, `python benchmarks/quality.py` writes it anew."""
    page = quality.page(*map(quality.kept, quality.NAMES))
    assert (ROOT / "docs" / "quality.md").read_text(encoding="utf-8") == page


def test_the_figures_are_of_the_schemes_as_they_are() -> None:
    """Every shipped scheme and every variant, under the hash that its spec has now."""
    found, more = map(quality.kept, quality.NAMES)
    assert {one.scheme: one.hash for one in found.results} == {name: scheme.hash for name, scheme in ALL.items()}
    now = {name: getattr(variants, name).hash for name in variants.ALL}
    assert {quality.short(one.scheme): one.hash for one in more.results} == now
    assert (found.about_model, found.about_text) == (more.about_model, more.about_text)
    assert found.settings == {**more.settings, "tasks": found.settings["tasks"]}


def test_a_pair_has_a_note_where_theory_does_not_hold_and_nowhere_else() -> None:
    for law, seen in quality.held(*map(quality.kept, quality.NAMES)):
        assert bool(law.note) == (seen.verdict != "yes"), law


def test_what_theory_is_surest_of_holds() -> None:
    """Finer groups, keys per channel at 2 bits, rotations before scales per token: of the pairs in one choice."""
    verdicts = {(law.better, law.worse): seen.verdict for law, seen in quality.held(*map(quality.kept, quality.NAMES))}
    for pair in (
        ("kivi2", "kivi2_group64"),
        ("token2_group32", "token2"),
        ("kivi2_window32", "kivi2_keys_by_token"),
        ("token2_rotated", "token2"),
        ("token4_rotated", "token4"),
    ):
        assert verdicts[pair] == "yes", pair


def test_a_folder_becomes_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept of a folder is an evaluation again, with the same numbers but those of single places."""
    whole: dict[str, Any] = quality.kept("variants").to_dict()
    text = whole["results"][0]["tasks"]["perplexity"]
    (tmp_path / "results.json").write_text(json.dumps(whole).replace('"kl_by_place": []', '"kl_by_place": [0.5]'))
    monkeypatch.setattr(quality, "KEPT", tmp_path / "kept")
    quality.keep("variants", tmp_path)
    assert text["kl_by_place"] == [] and quality.kept("variants").to_dict() == whole
