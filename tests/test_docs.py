"""The pages of documentation: every block of code holds, every link leads somewhere, the site is built without a
warning."""

from __future__ import annotations

import dataclasses
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

pytest.importorskip("sybil", reason="the extra `docs` is not installed")
from doc_blocks import LANGUAGES, REASONS, languages, parsed, unrun  # noqa: E402  (needs sybil)

from kvdsl import codes, scheme, store, tiers  # noqa: E402
from kvdsl.part import Part  # noqa: E402
from kvdsl.scheme import PARTS, Largest, Origin, Saliency  # noqa: E402
from kvdsl.schemes import ALL  # noqa: E402
from kvdsl.tiers import ROUTERS  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
TEXTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), *TEXTS]
RUN = [path for path in PAGES if "```" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", RUN, ids=lambda path: path.stem)
def test_every_block_of_a_page_holds(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, in a folder of the page's own."""
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "110")
    routers = dict(ROUTERS)
    try:
        document = parsed(path)
        for example in document.examples():
            example.evaluate()
        assert not document.namespace.get("__printed__"), "a block prints what the page does not show"
    finally:  # those that a page defined
        ROUTERS.clear()
        ROUTERS.update(routers)


@pytest.mark.parametrize("path", RUN, ids=lambda path: path.stem)
def test_what_is_shown_and_not_run_says_why(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert set(languages(text)) <= set(LANGUAGES)
    why = list(unrun(parsed(path)))
    assert set(why) <= set(REASONS)
    assert len(why) == len(re.findall("<!-- not run", text)) <= 6, "a mark stands on the line before its block"


@pytest.mark.parametrize("kind", [*PARTS.values(), Saliency, Largest, Origin], ids=lambda kind: kind.__name__)
def test_the_language_is_told_whole(kind: type[Part]) -> None:
    """Every part in a section of its own, or among routers: its fields, the words that they take, an example."""
    text = (ROOT / "docs" / "language.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^##+ (\w+)\n(.*?)(?=^##)", text, re.MULTILINE | re.DOTALL))
    section = sections["Routers" if kind.__name__ in ROUTERS else kind.__name__]
    assert re.search(rf"\b{kind.__name__}\(", "".join(re.findall("```python\n(.*?)```", text, re.DOTALL)))
    fields = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    assert {name for name in fields if not re.search(rf"`{name}[`=]", section)} == set()
    hints = get_type_hints(kind, localns={**vars(codes), **vars(tiers), **vars(store), **vars(scheme)})
    words = {word for name in fields for word in _words(hints[name])}
    assert {word for word in words if f'"{word}"' not in section} == set()


def _words(hint: Any) -> Iterator[str]:
    for one in get_args(hint):
        yield from [one] if isinstance(one, str) else _words(one)


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
def test_links_out_of_texts_beside_the_site_lead_somewhere(path: Path) -> None:
    """Those of the site are checked where it is built."""
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8")):
        assert "://" in link or (path.parent / link).exists(), link


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_files_that_a_page_names_are_there(path: Path) -> None:
    own = r"`((?:kvdsl|codegen|schemes|tests|benchmarks|examples|docs)/[\w/]+\.\w+)`"
    named = re.findall(own, path.read_text(encoding="utf-8"))
    assert {name for name in named if not (ROOT / name).exists()} == set()


def test_the_site_is_built_without_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `make docs` builds it, but with pages of a few schemes; a link to nowhere is a warning."""
    pytest.importorskip("material", reason="the extra `docs` is not installed")
    ours = shutil.ignore_patterns("systems")  # those of a build of another day
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=ours)
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    monkeypatch.setattr(sys, "argv", ["systems.py", "kivi2", "zipcache", "--out", str(tmp_path / "docs" / "systems")])
    runpy.run_path(str(ROOT / "benchmarks" / "systems.py"), run_name="__main__")
    for name in ALL.keys() - {"kivi2", "zipcache"}:  # what other pages lead to
        (tmp_path / "docs" / "systems" / f"{name}.md").write_text(f"# {name}\n")
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    site = tmp_path / "build" / "site"
    assert (site / "systems" / "kivi2.html").exists()
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|link|img)[^>]* (?:src|href)=\"?(\w+://[^\s\">]+)", text)
        assert not loaded, "a page loads nothing from elsewhere"
        said = re.sub(r"<pre.*?</pre>", "", text.partition("<article")[2].partition("</article>")[0], flags=re.DOTALL)
        lost = {tag for tag in re.findall(r"</?(\w[^\s>]*)", said) if tag in ("em", "sup") or not tag.isalnum()}
        assert not lost, f"{page.name}: stars, or angles, of a formula that is not marked as code"
