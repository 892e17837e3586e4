"""The report in a browser, in light and in dark: nothing is loaded, nothing complained of, everything readable.

Needs playwright and a Chromium, which KVDSL_BROWSER or the PATH names, or which playwright has fetched.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_cases import evaluation

from kvdsl.codegen import report

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
NAMES = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome", "chrome")
CONTRAST = 4.5  # of text against what is behind it, as WCAG 2.1 asks of AA

CONTRASTS = """
() => {
  const parts = colour => colour.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const light = colour => {
    const [r, g, b] = parts(colour).map(x => x / 255).map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const paper = light(getComputedStyle(document.body).backgroundColor);
  const against = colour => {
    const [low, high] = [light(colour), paper].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const found = [...document.querySelectorAll("h1, h2, p, a, th, td, caption, figcaption, summary")]
    .map(one => against(getComputedStyle(one).color));
  const drawn = [...document.querySelectorAll("svg text")].map(one => one.style.fill)
    .filter(colour => colour.startsWith("var("));
  const inked = [...new Set(drawn)].map(name => {
    const probe = document.createElement("p");
    probe.style.color = name;
    document.body.append(probe);
    const colour = getComputedStyle(probe).color;
    probe.remove();
    return against(colour);
  });
  return [...found, ...inked];
}
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = os.environ.get("KVDSL_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)
    with playwright.sync_playwright() as started:
        try:
            found = started.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        except playwright.Error as error:
            pytest.skip(f"no browser runs here: {str(error).splitlines()[0]}; set KVDSL_BROWSER to a Chromium")
        yield found
        found.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    report.write(evaluation(), path)
    return path


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_read_in_light_and_in_dark(scheme: str, browser: Any, page: Path) -> None:
    opened = browser.new_page(color_scheme=scheme, viewport={"width": 1000, "height": 800})
    said, asked = list[str](), list[str]()
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("dialog", lambda dialog: said.append(dialog.message))
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(page.as_uri())
    assert said == [] and asked == [page.as_uri()]
    paper = opened.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
    contrasts = opened.evaluate(CONTRASTS)
    assert len(contrasts) > 100 and min(contrasts) >= CONTRAST
    drawn = opened.evaluate("[...document.querySelectorAll('svg')].map(one => one.getBoundingClientRect().height)")
    assert len(drawn) == 9 and min(drawn) > 50
    opened.close()


def test_a_narrow_page_scrolls_tables_and_not_itself(browser: Any, page: Path) -> None:
    opened = browser.new_page(viewport={"width": 380, "height": 700})
    opened.goto(page.as_uri())
    assert opened.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert opened.evaluate("[...document.querySelectorAll('.wide')].some(one => one.scrollWidth > one.clientWidth)")
    opened.close()
