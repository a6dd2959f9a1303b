"""docs/porting.md keeps its word: its Python backend conforms, its commands run, its faults are those of the port."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from rattention.conformance.cli import app
from rattention.conformance.reporting.summary import matrix
from rattention.conformance.runner import Settings, conform
from rattention.spec import load
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "porting.md").read_text(encoding="utf-8")
PORT = ROOT / "conformance" / "ports" / "c"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE)
COMMANDS = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines() if line.strip()]
SMOKE = [line for line in COMMANDS if line.startswith("rattention conform") and "smoke" in line]

needs_compiler = pytest.mark.skipif(
    shutil.which("cc") is None or shutil.which("make") is None, reason="no C compiler or no make on PATH"
)


def test_python_backend_conforms():
    """Smoke, first operation: what it declares is green, the rest unsupported."""
    source = next(text for kind, text in BLOCKS if kind == "python")
    names: dict = {}
    exec(compile(source, "porting.md", "exec"), names)
    outcome = conform("mine", Settings("smoke", seed=3), backend=names["backend"])
    assert outcome.conforming, [f.violations[0].message for f in outcome.failures]
    judged = [r for r in outcome.results if r.property_name == "agreement"]
    assert {r.op for r in judged if r.status == "pass"} == {"feature_map"}
    shown = {op: set(row.values()) for op, row in matrix(outcome).items()}
    assert {op for op, row in shown.items() if "pass" in row} == {"feature_map"}
    assert set().union(*(row for op, row in shown.items() if op != "feature_map")) == {"unsupported"}


@needs_compiler
@pytest.mark.parametrize("command", SMOKE)
def test_smoke_commands_are_green(command, tmp_path, monkeypatch):
    for name in ("rattention_port.c", "Makefile"):
        shutil.copy(PORT / name, tmp_path)
    subprocess.run(["make", "--silent"], cwd=tmp_path, check=True, timeout=120)
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)[1:]
    result = CliRunner().invoke(app, [*words, "--seed", "5"])
    assert result.exit_code == 0, result.output


def test_commands_and_clauses_exist():
    assert len(SMOKE) >= 6
    for label in re.findall(r"`([A-Z]+-\d+)`", GUIDE):
        assert label in load().clauses
    for line in COMMANDS:
        select = re.search(r"--select (\S+)", line)
        assert not select or select[1] in load().operations


def test_table_of_faults():
    """Each row of the table is a fault of the source, and each fault of the source has a row."""
    source = (PORT / "rattention_port.c").read_text(encoding="utf-8")
    planted = {int(n) for n in re.findall(r"FAULT == (\d)", source)}
    rows = {int(n): labels for n, labels in re.findall(r"^\| (\d) \| ([^|]+) \|", GUIDE, re.MULTILINE)}
    assert set(rows) == planted
    assert all(re.findall(r"`([A-Z]+-\d+)`", labels) for labels in rows.values())
