"""The report of an evaluation: every figure of the terminal, one page that loads nothing, names that do no harm."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from report_cases import ODD, evaluation, result

import kvdsl
from kvdsl.codegen import evaluating, report, report_maps, report_plots, report_times
from kvdsl.codegen.answer import finite
from kvdsl.codegen.cli import run
from kvdsl.codegen.report_plots import Point
from kvdsl.codegen.roofline import card
from kvdsl.evaluation import Evaluation
from kvdsl.evaluation.results import Tasks
from kvdsl.evaluation.tables import NOT_FINITE, bits, losses
from kvdsl.markup import Html, element

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
Captured = pytest.CaptureFixture[str]


class Seen(HTMLParser):
    """Elements with their attributes, and the cells of all tables."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements = list[tuple[str, dict[str, str | None]]]()
        self.cells = list[str]()
        self._open = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("td", "th"):
            self.cells.append("")
            self._open = True

    def handle_endtag(self, tag: str) -> None:
        self._open = self._open and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._open:
            self.cells[-1] += data


@pytest.fixture(scope="module")
def page() -> str:
    return report.page(evaluation())


@pytest.fixture(scope="module")
def seen(page: str) -> Seen:
    return Seen(page)


def written(folder: Path, found: Evaluation) -> Path:
    """A folder as `kvdsl eval --out` leaves it."""
    (folder / "results.json").write_text(json.dumps(finite(found.to_dict())), encoding="utf-8")
    return folder


# -- what is on the page -----------------------------------------------------------------------------------------------


def test_the_page_has_every_figure_of_the_terminal(seen: Seen) -> None:
    tables, lines = evaluating.told(evaluation())
    assert len(tables) == 2 and tables[0].row_count == 4
    for table in tables:
        for column in table.columns:
            for cell in (column.header, *column.cells):
                assert cell in seen.cells
    assert lines == [f"note      backend torch; {ODD}", "left out  bitdecoding4: groups do not divide; and 1 more"]


def test_the_page_says_what_was_run(page: str, seen: Seen) -> None:
    for told in ("m, llama, digest d1g", "some.txt, sha256 5ha256", "4000, scored from 512", "7", "2.13.0"):
        assert told in seen.cells
    command = next(cell for cell in seen.cells if cell.startswith("kvdsl eval kivi2 kivi4 "))
    assert command.endswith("--text some.txt --seed 7 --windows 3")
    assert "left out: bitdecoding4: groups do not divide; and 1 more" in page
    assert "microseconds a step" in page and "by bytes alone" in page and "nothing was timed" in page


def test_a_command_names_what_only_python_can_ask() -> None:
    found = evaluation()
    settings = {**kvdsl.evaluation.FULL.to_dict(), "lengths": [300, 600], "keys": 9}
    told = report.command(replace(found, settings=settings, model="m"))
    assert told.endswith("--model m --text some.txt --full --lengths 300,600; in Python also keys 9")


def test_every_plot_is_there_and_told_in_words(seen: Seen) -> None:
    drawn = [about for tag, about in seen.elements if tag == "svg"]
    names = [about["id"] for tag, about in seen.elements if tag == "figure"]
    assert names == [
        "figure-bits-kl", "figure-bits-perplexity", "figure-quality", "figure-lengths", "figure-time-kl",
        "figure-errors-output", "figure-errors-score", "figure-keys-passkey", "figure-keys-needle",
    ]  # fmt: skip
    assert len(drawn) == len(names) and all(about["role"] == "img" and about["aria-label"] for about in drawn)
    assert "on the front: kivi2 (3.25; 0.21), kivi4 (5.25; 0.013)." in str(drawn[0]["aria-label"])
    assert all(about.get("scope") in ("col", "row") for tag, about in seen.elements if tag == "th")


def test_colours_of_plots_are_those_of_the_page(page: str) -> None:
    drawn = " ".join(re.findall("<svg.*?</svg>", page, re.DOTALL))
    used, known = set(re.findall(r"var\((--[\w-]+)\)", drawn)), set(re.findall(r"(--[\w-]+):", page))
    assert {"--ink", "--faint", "--series-0", "--series-1"} <= used <= known
    light, dark = (page.count(f"{name}: #") for name in ("--ink", "--series-6"))
    assert light == dark == 2 and "prefers-color-scheme: dark" in page
    text = re.findall(r"<text[^>]*fill: ([^\"]*)\"", drawn)
    assert text and set(text) <= {"var(--ink)", "#000000", "#ffffff"}  # the latter on cells, whose colours stay


# -- one page, whole and harmless --------------------------------------------------------------------------------------


def test_the_page_is_well_formed_and_no_id_stands_twice(page: str, seen: Seen) -> None:
    kind, _, rest = page.partition("\n")
    assert kind == "<!DOCTYPE html>" and ElementTree.fromstring(rest).tag == "html"
    ids = [str(about["id"]) for _, about in seen.elements if "id" in about]
    assert len(ids) == len(set(ids))
    targets = [str(about[name])[1:] for _, about in seen.elements for name in ("href", "xlink:href") if name in about]
    assert targets and {*targets, *re.findall(r"url\(#([^)]*)\)", page)} <= set(ids)


def test_the_page_loads_nothing(page: str, seen: Seen) -> None:
    for tag, about in seen.elements:
        assert tag not in ("script", "link", "img", "iframe", "object", "embed", "base")
        for name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            assert (about.get(name) or "#").startswith("#")
        assert not any(name.startswith("on") for name in about)
    assert "@import" not in page and not re.search(r"url\((?!#)", page)
    assert set(re.findall(r'\S*="https?://[^"]*', page)) <= {
        'xmlns="http://www.w3.org/2000/svg', 'xmlns:xlink="http://www.w3.org/1999/xlink',
    }  # fmt: skip


def test_names_and_texts_are_escaped(page: str, seen: Seen) -> None:
    assert "<script" not in page and "</pre> kivi2" not in page and ODD in seen.cells
    assert unescape(page).count(ODD) >= 5 and "$b$" in page  # a dollar is no formula
    assert element("b", "<i>", Html("<i>"), title='"') == '<b title="&quot;">&lt;i&gt;<i></b>'


def test_names_that_look_like_what_a_plot_is_made_of_stay_as_they_are() -> None:
    names = ("#1c1c21", "_hidden", 'id="x" url(#y)')
    drawn = report_plots.lengths(evaluation(*(result(name, 3.0, 0.1) for name in names)))
    assert drawn is not None
    texts = [unescape(text) for text in re.findall("<text[^>]*>([^<]*)</text>", drawn.svg)]
    assert set(names) <= set(texts)


def test_the_page_is_the_same_each_time(page: str) -> None:
    assert report.page(Evaluation.from_dict(json.loads(json.dumps(evaluation().to_dict())))) == page


# -- results that are few, many or not finite --------------------------------------------------------------------------


def test_what_is_not_finite_is_told(tmp_path: Path) -> None:
    """JSON has null for it; the table of the terminal says the same."""
    one = result("kivi2", 3.0, 0.1)
    assert one.tasks.perplexity is not None
    text = replace(one.tasks.perplexity, perplexity=float("inf"), delta=float("nan"), interval=(1.0, float("inf")))
    lost = replace(one, tasks=replace(one.tasks, perplexity=text), perplexity=None)
    found = evaluation(lost, result("kivi4", 5.0, 0.2))
    again = report.read(written(tmp_path, found))
    assert losses(again) == losses(found) and losses(found).rows[1][2] == f"{NOT_FINITE} (1.0 to {NOT_FINITE})"
    assert NOT_FINITE in report.page(again)
    assert [point.name for point in report_plots.perplexities(again, {"kivi2": 3, "kivi4": 5})] == ["kivi4"]


def test_a_page_of_one_task_and_of_none() -> None:
    one = result("kivi2", 3.0, 0.1)
    for tasks, names in (
        (replace(one.tasks, perplexity=None, layers=None, greedy=None, needle=None), ["keys-passkey", "lengths"]),
        (Tasks(), ["lengths"]),
    ):
        seen = Seen(report.page(evaluation(replace(one, tasks=tasks))))
        found = [str(about["id"]) for tag, about in seen.elements if tag == "figure"]
        assert sorted(found) == [f"figure-{name}" for name in names]
    nothing = report.page(evaluation(replace(one, refused="it does not fit", storage=None, tasks=Tasks())))
    assert "Beside full precision: no scheme." in nothing and "kivi2: it does not fit" in nothing


def test_many_schemes_are_named_on_the_front_alone() -> None:
    many = [result(name, 2 + i / 8, 1 / (1 + i % 7)) for i, name in enumerate(kvdsl.names()[:20])]
    drawn = report_plots.fronts(evaluation(*many))
    front = report_plots.front(
        report_plots.divergences(evaluation(*many), {one.scheme: 2 + i / 8 for i, one in enumerate(many)})
    )
    assert "schemes off the front are named in the tables" in drawn[0].about
    named = [one.scheme for one in many if f">{one.scheme}</text>" in drawn[0].svg]
    assert set(named) == {point.name for point in front} and 1 < len(named) < 16


def test_numbers_beside_a_scale_of_colours_are_plain() -> None:
    """A formula is not parsed here, so a default one would stand there as TeX."""
    for many in ({"kivi2": 0.2}, {"kivi2": 0.2, "kivi4": 0.02}):  # those between powers of ten are told, are too many
        drawn = report_maps.errors(evaluation(*(result(name, 3.0, lost) for name, lost in many.items())), "output")
        assert drawn is not None and "mathdefault" not in drawn.svg and ">0.1</text>" in drawn.svg


def test_the_front_is_what_nothing_beats() -> None:
    points = [
        Point("a", 2, 5),
        Point("b", 3, 5),
        Point("c", 3, 4),
        Point("d", 4, 4.5),
        Point("e", 2, 6),
        Point("f", 9, 0),
    ]
    assert [point.name for point in report_plots.front(points)] == ["a", "c", "f"]


def test_times_are_bytes_over_what_memory_gives() -> None:
    found = evaluation()
    times = report_times.of_bytes(found, card("h200"))
    assert times is not None and times.tokens == 4096 and (times.gpu, len(times.by_scheme)) == ("H200", 3)
    storage = found.results[0].storage
    assert storage is not None
    parts = storage.sizes[-1].parts
    read = parts.code + parts.metadata + parts.index + parts.window / 2  # the model is in float32
    assert times.by_scheme["kivi2"] == pytest.approx(read / (0.93 * 4.40e12) * 1e6)
    with pytest.raises(ValueError, match="gpu: 'T4' is none of A100 80 GB, H100, H200, B200"):
        card("T4")


def test_times_from_machine_code_are_of_schemes_known_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of a document run no file, and a scheme that changed since is no longer the one that was measured."""
    found = evaluation(
        result("kivi2", 3.0, 0.1), result("zipcache", 3.3, 0.1), result("kvtuner", 4.0, 0.1),
        result("evil.py:x", 3.0, 0.1), replace(result("kivi4", 5.0, 0.1), hash="another"),
    )  # fmt: skip
    monkeypatch.setattr(
        "kvdsl.codegen.predicting.predicted",
        lambda schemes, shape, cards: [{"scheme": name, "share": 0.5} for name in schemes],
    )
    slow, fast = (
        report_times.of_code(found, card("H100")),
        report_times.of_bytes(found, card("H100")),
    )
    assert list(slow.by_scheme) == ["kivi2"] and fast is not None
    assert slow.how.endswith("of fp16")  # the model is in float32
    assert 1.5 < slow.by_scheme["kivi2"] / fast.by_scheme["kivi2"] < 1.86
    with pytest.raises(ValueError, match="none of these schemes is known by name"):
        report_times.of_code(evaluation(result("kvtuner", 4.0, 0.1)), card("H100"))


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_makes_the_page_from_results_alone(tmp_path: Path, capsys: Captured, page: str) -> None:
    folder = written(tmp_path, evaluation())
    assert run(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"report    {folder / 'report.html'}\n"
    assert (folder / "report.html").read_text(encoding="utf-8") == page
    other = tmp_path / "other.html"
    assert run(["report", str(folder / "results.json"), "--out", str(other), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["report"] == str(other) and other.read_text(encoding="utf-8") == page
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "report.html", "other.html"}


def test_what_is_no_result_is_refused(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "no.json").write_text("{}")
    (tmp_path / "cut.json").write_text("{")
    wrong = evaluation().to_dict()
    wrong["results"][0]["tasks"]["perplexity"]["kl"] = "much"
    (tmp_path / "wrong.json").write_text(json.dumps(wrong))
    folder = tmp_path / "some"
    folder.mkdir()
    written(folder, evaluation())
    for arguments, message in (
        ([str(tmp_path)], "results.json"),
        ([str(tmp_path / "no.json")], "give a document that `kvdsl eval` wrote"),
        ([str(tmp_path / "cut.json")], "give a results.json"),
        ([str(tmp_path / "wrong.json")], "'much' is no float"),
        ([str(folder), "--gpu", "T4"], "gpu: 'T4' is none of"),
    ):
        assert run(["report", *arguments]) == 2
        said = capsys.readouterr()
        assert message in said.err and said.err.count("\n") == 1 and not said.out
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize("module", ["matplotlib", "jinja2"])
def test_a_missing_extra_is_named(
    module: str, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    folder = written(tmp_path, evaluation())
    assert run(["report", str(folder)]) == 2
    assert "pip install 'kvdsl[plot]'" in capsys.readouterr().err
    assert evaluating.reported(folder) is None
    told = capsys.readouterr().err
    assert "pip install 'kvdsl[plot]'" in told and f"; then: kvdsl report {folder}" in told and told.count("\n") == 1
    assert (folder / "results.json").exists() and not (folder / "report.html").exists()


# -- notebooks ---------------------------------------------------------------------------------------------------------


def test_a_notebook_shows_schemes_and_results() -> None:
    scheme = kvdsl.load("kvtuner").with_(source="<b>me</b>")
    told = Seen(scheme._repr_html_())
    assert {"recent", "Recent(128)", "layers 0, 6, 29", scheme.hash, "<b>me</b>"} <= set(told.cells)
    assert "keys 5.000, values 3.000, mean 4.000" in told.cells and "b" not in {tag for tag, _ in told.elements}
    found = evaluation()
    told = Seen(found._repr_html_())
    for sheet in (losses(found), bits(found)):
        assert {cell for row in (sheet.heads, *sheet.rows) for cell in row} <= set(told.cells)
    for page in (scheme._repr_html_(), found._repr_html_()):
        ElementTree.fromstring(page)
        assert "<script" not in page


def test_a_notebook_shows_kernels() -> None:
    kernels = kvdsl.build(kvdsl.load("kivi2"), kvdsl.Shape(64, 2), backend="torch")
    told = Seen(kernels._repr_html_())
    assert {repr(kernels.scheme), repr(kernels.shape), str(kernels.path), f"torch: {kernels.why}"} <= set(told.cells)
