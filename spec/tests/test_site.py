"""The site: staging keeps every page and every link, and Sphinx builds it without a warning where it is installed."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

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


def test_the_site_builds_without_a_warning(tmp_path: Path):
    for package in ("sphinx", "myst_parser", "furo"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed (extra: docs)")
    run = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "build.py"), str(tmp_path / "site"), str(tmp_path / "stage")],
        env={**os.environ, "PYTHONPATH": str(ROOT / "spec")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert (tmp_path / "site" / "index.html").is_file()
