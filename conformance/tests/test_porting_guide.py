"""docs/porting.md keeps its word: its Python port conforms at every step, its commands run, its faults are real."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rattention.conformance.cli import app
from rattention.conformance.reporting.summary import matrix
from rattention.conformance.runner import Outcome, Settings, conform
from rattention.spec import load
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "porting.md").read_text(encoding="utf-8")
PORT = ROOT / "conformance" / "ports" / "c"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE)
COMMANDS = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines() if line.strip()]
SMOKE = [line for line in COMMANDS if line.startswith("rattention conform") and "smoke" in line]
IN_C = [line for line in SMOKE if "exec:" in line]
FRAME = "--select description"
"""What the frame without an operation is run with, and fails."""

needs_compiler = pytest.mark.skipif(
    shutil.which("cc") is None or shutil.which("make") is None, reason="no C compiler or no make on PATH"
)
# NaN and infinity are data, and NumPy warns of them.
computes = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def is_autodiff(text: str) -> bool:
    return "import jax" in text


def steps() -> list[tuple[str, str]]:
    """Each command for `port.py`, with the file as it stands at that place of the guide."""
    found, source = [], ""
    for kind, text in BLOCKS:
        if kind == "python" and not is_autodiff(text):
            source += text + "\n\n"
        elif kind == "sh":
            found += [(line, source) for line in text.splitlines() if line in SMOKE and line not in IN_C]
    return found


STEPS = steps()


def backend_of(source: str) -> Any:
    module = ModuleType("port")
    exec(compile(source, "port.py", "exec"), module.__dict__)
    return module.backend


def held(command: str, source: str) -> Outcome:
    """What a command of the guide finds, in this process."""
    select = re.search(r"--select (\S+)", command)
    settings = Settings("smoke", seed=3, select=select[1] if select else "")
    return conform("port.py:backend", settings, backend=backend_of(source))


@computes
@pytest.mark.parametrize(
    ("command", "source"), [s for s in STEPS if FRAME not in s[0]], ids=lambda x: x[-30:].strip() if x in SMOKE else ""
)
def test_python_port_conforms_at_every_step(command, source):
    outcome = held(command, source)
    assert outcome.conforming, [f.violations[0].message for f in outcome.failures]
    assert any(r.status == "pass" and r.property_name == "agreement" for r in outcome.results)


def test_frame_without_an_operation_says_what_the_guide_says():
    ((command, source),) = [s for s in STEPS if FRAME in s[0]]
    outcome = held(command, source)
    said = {v.message for f in outcome.failures for v in f.violations}
    assert said == {"describe(): operations is empty"}
    assert "`describe(): operations is empty`" in GUIDE


@computes
def test_whole_python_port():
    """The last step runs everything: what is declared passes in every dtype, the rest is unsupported."""
    command, source = STEPS[-1]
    assert "--select" not in command
    declared = set(backend_of(source).describe()["operations"])
    assert len({op for op in declared if op.endswith(".vjp")}) >= 3
    shown = {op: set(row.values()) for op, row in matrix(held(command, source)).items()}
    assert {op for op, row in shown.items() if row == {"pass"}} == declared
    assert set().union(*(row for op, row in shown.items() if op not in declared)) == {"unsupported"}


@computes
@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("(back <= window)", "(back < window)", "as if the window were 0"),
        ("Hkv, G, D)", "Hkv, -1, D)", "cannot reshape array of size 0"),
    ],
)
def test_what_the_guide_shows_of_failures(old, new, words):
    """The faults of the guide are found, with the words that it prints."""
    command, source = STEPS[-1]
    assert source.count(old) == 1
    outcome = held(command, source.replace(old, new))
    assert any(words in str(vars(v)) for f in outcome.failures for v in f.violations)


@pytest.mark.parametrize("op", ["feature_map.vjp", "rms_mix.vjp"])
def test_automatic_differentiation(op):
    """The variant of port.py in JAX: the same functions, gradients by `jax.vjp`."""
    pytest.importorskip("jax")
    source = STEPS[-1][1].replace("import numpy as np", "import jax.numpy as np", 1)
    source += next(text for kind, text in BLOCKS if kind == "python" and is_autodiff(text))
    outcome = held(f"--select {op}", source)
    assert outcome.conforming, [f.violations[0].message for f in outcome.failures]
    assert any(r.op == op and r.status == "pass" for r in outcome.results)


@needs_compiler
@pytest.mark.parametrize("command", IN_C)
def test_smoke_commands_are_green(command, tmp_path, monkeypatch):
    for name in ("rattention_port.c", "Makefile"):
        shutil.copy(PORT / name, tmp_path)
    subprocess.run(["make", "--silent"], cwd=tmp_path, check=True, timeout=120)
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)[1:]
    result = CliRunner().invoke(app, [*words, "--seed", "5"])
    assert result.exit_code == 0, result.output


def test_commands_and_clauses_exist():
    assert len(IN_C) >= 6
    assert len(STEPS) >= 6
    for label in re.findall(r"`([A-Z]+-\d+)`", GUIDE):
        assert label in load().clauses
    for line in COMMANDS:
        select = re.search(r"--select (\S+)", line)
        assert not select or select[1] in load().operations or FRAME in line


def test_table_of_faults():
    """Each row of the table is a fault of the source, and each fault of the source has a row."""
    source = (PORT / "rattention_port.c").read_text(encoding="utf-8")
    planted = {int(n) for n in re.findall(r"FAULT == (\d)", source)}
    judge = GUIDE.split("## How good is the judge?")[1]
    rows = {int(n): labels for n, labels in re.findall(r"^\| (\d) \| ([^|]+) \|", judge, re.MULTILINE)}
    assert set(rows) == planted
    assert all(re.findall(r"`([A-Z]+-\d+)`", labels) for labels in rows.values())
