"""The programs in README, guide and CONTRIBUTING run as they stand, and README speaks of what exists."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "docs/guide.md"]
NEEDS = ["torch", "jax"]
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before any program imports jax


def blocks() -> list[tuple[str, int, str]]:
    found = []
    for name in DOCUMENTS:
        text = (ROOT / name).read_text(encoding="utf-8")
        for match in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            found.append((name, text[: match.start()].count("\n") + 1, match[1]))
    return found


@pytest.mark.parametrize(("name", "line", "code"), blocks(), ids=[f"{n}:{i}" for n, i, _ in blocks()])
def test_program_runs(name: str, line: int, code: str, capsys: pytest.CaptureFixture[str]):
    for package in ("numpy", *NEEDS):
        if f"rattention.{package}" in code:
            for module in (package, f"rattention.{package}"):
                if importlib.util.find_spec(module) is None:
                    pytest.skip(f"{module} is not installed")
    namespace: dict[str, object] = {"__name__": "program"}
    exec(compile("\n" * line + code, name, "exec"), namespace)
    if "print(" in code:  # the printed line stands beside it in a comment
        printed = [float(x) for x in re.findall(r"\d+\.?\d*", capsys.readouterr().out)]
        shown = re.search(r"print\(.*?#(.*)", code)
        assert shown
        assert printed == [float(x) for x in re.findall(r"\d+\.?\d*", shown[1])]


def test_the_backend_of_contributing_is_a_backend():
    import numpy as np
    from rattention.spec import Backend, Unsupported

    code = next(code for name, _, code in blocks() if name == "CONTRIBUTING.md")
    namespace: dict = {"__name__": "port"}
    exec(code, namespace)
    port = namespace["backend"]
    assert isinstance(port, Backend)
    x = np.array([0.0, 0.0, 10.0], np.float32).reshape(1, 1, 1, 3)
    for kind in ("softmax", "relu", "identity"):
        out = port.run("feature_map", {"x": x}, {"feature_map": kind})["out"]
        assert out.shape[-1] == (3 if kind == "identity" else 6)
    with pytest.raises(Unsupported):
        port.run("feature_map", {"x": x.astype(np.float16)}, {})


def test_the_backend_of_contributing_conforms(tmp_path: Path):
    if importlib.util.find_spec("rattention.conformance") is None or importlib.util.find_spec("hypothesis") is None:
        pytest.skip("rattention.conformance is not installed")
    port = tmp_path / "port.py"
    port.write_text(next(code for name, _, code in blocks() if name == "CONTRIBUTING.md"), encoding="utf-8")
    command = "from rattention.conformance.cli import main; main()"
    run = subprocess.run(
        [sys.executable, "-c", command, "conform", f"{port}:backend", "--profile", "smoke", "--seed", "1"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_figure_is_what_its_script_draws():
    script = ROOT / "docs" / "figures" / "coverage.py"
    assert runpy.run_path(str(script))["draw"]() == script.with_suffix(".svg").read_text(encoding="utf-8")


def test_the_examples_are_about_twenty_lines():
    for name, line, code in blocks():
        if name == "README.md":
            lines = [x for x in code.splitlines() if x.strip()]
            assert 10 <= len(lines) <= 22, f"{name}:{line} has {len(lines)} lines"


def test_readme_names_make_targets_folders_and_versions_that_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"make (\w+)", text + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for folder in re.findall(r"^\| \[?`([\w/]+/)`", text, re.MULTILINE):
        if folder != "benchmarks/":  # git keeps no empty folder
            assert (ROOT / folder).is_dir(), folder
    from rattention.spec import load

    assert load().version in text
    assert load().version in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "badge" not in text


def test_figures_of_speed_come_from_results():
    """A ratio such as 2.7x in README stands in a file of benchmarks/results too."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    results = [json.loads(p.read_text()) for p in (ROOT / "benchmarks" / "results").glob("*.json")]
    known = json.dumps(results)
    for ratio in re.findall(r"(\d+\.\d+)\s?[x×]", text):
        assert ratio in known, ratio


def test_no_document_installs_from_an_index():
    """Nothing is published: an install names a checkout or a git address, and extras that exist."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    pages = [p for folder in (ROOT, *(ROOT / f for f in ("docs", "spec", "conformance"))) for p in folder.glob("*.md")]
    commands = [c for p in pages for c in re.findall(r"pip install ([^\n`#]+)", p.read_text(encoding="utf-8"))]
    assert commands
    for command in commands:
        assert re.match(r"(-e )?'(\.\[|rattention(\[[\w,]+\])? @ git\+)", command), command
        assert {e for names in re.findall(r"\[([\w,]+)\]", command) for e in names.split(",")} <= set(extras), command
