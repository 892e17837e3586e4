"""The study of schemes: what its figures mean, that the seeds alone decide them, and that its page is up to date."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

import kvdsl
from kvdsl import PreRope, Recent, Rotate, Scheme, Store, Uniform, per_channel, per_token, study
from kvdsl.codegen import studying
from kvdsl.codegen.cli import run
from kvdsl.schemes import ALL

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "schemes.md").read_text(encoding="utf-8")
TABLE, _, SEEDS = PAGE.partition("## Over seeds")
Captured = pytest.CaptureFixture[str]


def rows(text: str) -> dict[str, list[str]]:
    """The rows of a table by their names, cell by cell."""
    found = re.findall(r"^\| `(\w+)` \| (.*) \|$", text, re.MULTILINE)
    return {name: cells.split(" | ") for name, cells in found}


def mean(found: dict[str, study.Spread], name: str) -> float:
    return found[name]["mean"]


def test_a_seed_goes_to_what_is_drawn_and_nowhere_else() -> None:
    drawn = Store(Uniform(4), scale=per_token(), transform=(Rotate("hadamard"), Rotate("orthogonal", seed=0)))
    scheme = Scheme(keys=drawn, values=Store(Uniform(4), scale=per_token()))
    assert study.seeded(scheme) and not study.seeded(ALL["quarot4"]) and study.seeded(ALL["qjl_gauss"])
    found = study.reseeded(scheme, 7)
    assert found.keys.transform == (Rotate("hadamard"), Rotate("orthogonal", seed=7)) and found.values == scheme.values


def test_nothing_is_lost_where_nothing_is_rounded() -> None:
    found = study.studied(ALL["fp32"], backend="torch")
    assert all(spread == {"mean": spread["mean"], "std": 0.0} for spread in found.values())
    assert mean(found, "keys_mse") == mean(found, "values_mse") == 0 and mean(found, "output_error") < 1e-5


def test_the_error_spreads_over_the_seeds_and_the_same_seeds_give_the_same() -> None:
    found = study.studied(ALL["turboquant3"], 4, "torch")
    assert found == study.studied(ALL["turboquant3"], 4, "torch")
    assert mean(found, "keys_mse") == pytest.approx(0.03397, rel=0.02)
    assert all(0 < spread["std"] < 0.1 * spread["mean"] for spread in found.values())


def test_what_protects_outlier_channels_shows_in_the_scores() -> None:
    """At four bits a token and head: rotated, or balanced against the queries, keys are told apart far better."""
    plain, turned, learned = (study.studied(ALL[name], 1, "torch") for name in ("token4", "quarot4", "omniquant4"))
    assert mean(turned, "score_error") < 0.5 * mean(plain, "score_error")
    assert mean(learned, "score_error") < 0.5 * mean(plain, "score_error")
    assert mean(turned, "keys_mse") == pytest.approx(mean(plain, "keys_mse"), rel=0.02)


def test_keys_stored_before_rotation_are_studied_on_the_same_numbers() -> None:
    """Turned there and back, the errors are those of the store without PreRope."""
    stores = [Store(Uniform(4), scale=per_channel(tokens=64), transform=part) for part in (PreRope(), ())]
    schemes = [Scheme(keys=store, values=Store(), recent=Recent(64)) for store in stores]
    turned, plain = (study.studied(scheme, 1, "torch") for scheme in schemes)
    for name in ("keys_mse", "score_error"):
        assert mean(turned, name) == pytest.approx(mean(plain, name), rel=0.03)


def asked(captured: Captured, *arguments: str) -> str:
    assert run(["study", "--backend", "torch", *arguments]) == 0
    return captured.readouterr().out


def test_the_command_gives_a_table_a_document_and_the_page(capsys: Captured) -> None:
    capsys.readouterr()
    names = ("q4_0", "int4_token_head", "--seeds", "2")
    document: dict[str, Any] = json.loads(asked(capsys, *names, "--json"))
    first, second = document["results"]
    assert (first["scheme"], first["runs"], second["scheme"], second["runs"]) == ("q4_0", 1, "int4_token_head", 2)
    assert first["keys_mse"]["mean"] == pytest.approx(0.00739, rel=0.02) and first["keys_mse"]["std"] == 0
    table = asked(capsys, *names)
    assert "score error" in table and "int4_token_head" in table and "±" in table
    page = asked(capsys, *names, "--markdown")
    assert page.startswith(studying.PAGE) and list(rows(page)) == ["q4_0", "int4_token_head"]
    assert run(["study"]) == 2 and "name one or more schemes, or give --all" in capsys.readouterr().err


def test_the_page_holds_every_scheme_as_it_is() -> None:
    """When this fails, `kvdsl study --all --markdown > docs/schemes.md` writes it anew."""
    assert PAGE.startswith(studying.PAGE)
    assert list(rows(TABLE)) == list(ALL)
    assert list(rows(SEEDS)) == [name for name, scheme in ALL.items() if study.seeded(scheme)]
    for name, cells in rows(TABLE).items():
        before, after = studying.cells(studying.known(name, ALL[name]))
        assert (f"`{name}`", *cells[:2]) == before and tuple(cells[-4:]) == after


def test_bits_are_of_the_code_and_of_all_else_and_lines_those_that_a_scheme_is_made_of() -> None:
    """kivi4 is a line more than kivi2, which it changes; iq4_nl uses levels, a scale and a function of two lines."""
    assert studying.cells(studying.known("kivi2", ALL["kivi2"]))[0][1:] == ("3.000 = 2 + 1", "3.000 = 2 + 1")
    assert studying.cells(studying.known("int8_tensor", ALL["int8_tensor"]))[0][1:] == ("8.000", "8.000")
    lines = {name: studying.known(name, ALL[name])["lines"] for name in ("kivi2", "kivi4", "iq4_nl", "q8_0", "fp16")}
    assert lines == {"kivi2": 6, "kivi4": 7, "iq4_nl": 5, "q8_0": 3, "fp16": 1}


CHEAP = ["kivi2", "nvfp4", "kvtq_2bit", "nuq3"]


@pytest.mark.parametrize("name", ALL if settings.get_current_profile_name() == "thorough" else CHEAP)
def test_the_page_holds_the_figures_that_the_study_gives(name: str) -> None:
    found = study.studied(kvdsl.load(name), 20, "torch")
    figures = [float(cell) for cell in rows(TABLE)[name][2:6]]
    assert figures == pytest.approx([mean(found, measure) for measure in study.MEASURES], rel=0.02)
