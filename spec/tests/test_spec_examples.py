"""The examples of the chapters run as they stand, and hold."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

CHAPTERS = sorted(Path(__file__).resolve().parents[1].glob("[0-9][0-9]-*.md"))


def blocks() -> list[tuple[str, int, str]]:
    """(chapter, line, code) of every fenced python block."""
    found = []
    for path in CHAPTERS:
        text = path.read_text(encoding="utf-8")
        for match in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            found.append((path.name, text[: match.start()].count("\n") + 1, match[1]))
    return found


@pytest.mark.parametrize(("chapter", "line", "code"), blocks(), ids=[f"{c}:{n}" for c, n, _ in blocks()])
def test_example_runs_and_holds(chapter: str, line: int, code: str):
    for package in ("rattention.numpy", "onnx"):
        if re.search(rf"^(?:from|import) {package}\b", code, re.MULTILINE) and not importlib.util.find_spec(package):
            pytest.skip(f"{package} is not installed")
    # Blank lines in front, so that a traceback names the line of the chapter.
    exec(compile("\n" * line + code, chapter, "exec"), {"__name__": "example"})


def test_every_example_asserts_something():
    for chapter, line, code in blocks():
        assert "assert" in code, f"{chapter}:{line}"
