"""The command line: exit codes, replay, reports, seeds."""

import json
import re
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from rattention.conformance import __main__ as entry
from rattention.conformance import vectors
from rattention.conformance.cli import app
from rattention.conformance.properties import REGISTRY, make_case
from rattention.conformance.reporting.console import print_outcome
from rattention.conformance.reporting.summary import summarise
from rattention.conformance.runner import Settings, conform, plan_units
from rattention.conformance.strategies import make_plan
from rattention.conformance.workers import LOSSES
from rattention.spec import load
from rich.console import Console
from typer.testing import CliRunner

PORTS = Path(__file__).with_name("faulty_ports.py")


def call(*arguments: str):
    """Exit code and output of one command."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    return result.exit_code, result.output


def test_a_broken_backend_exits_1_and_its_replay_too(tmp_path):
    report = tmp_path / "report"
    arguments = ("conform", f"{PORTS}:zero", "--profile", "smoke", "--select", "rms_mix", "--seed", "3")
    code, output = call(*arguments, "--report", report)
    assert code == 1
    assert "NOT CONFORMING" in output
    assert "MIX-1" in output
    line = next(line for line in output.splitlines() if line.startswith("rattention replay"))
    _, _, file, backend = line.split()
    code, output = call("replay", file, backend)
    assert code == 1
    assert "FAIL" in output
    assert call("replay", file, "numpy")[0] == 0
    assert call("vectors", "check", file, f"{PORTS}:zero")[0] == 1
    _check_files(report)


def test_a_backend_that_takes_the_process_down_is_reported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, output = call("conform", f"{PORTS}:crash", "--profile", "smoke", "--select", "FM-2", "--seed", "3")
    assert code == 1
    assert "took its process down: the process ended with exit status 3" in " ".join(output.split())


def test_a_backend_that_hangs_is_given_up_and_what_was_left_out_is_said():
    settings = Settings("smoke", 3, select="feature_map", workers=2, timeout=0.5)
    outcome = conform(f"{PORTS}:hang", settings)
    report = summarise(outcome)
    assert not outcome.conforming
    assert LOSSES <= report["cases"]["failed"] < LOSSES + settings.workers  # the others are still at theirs
    assert report["cases"]["left_out"] == outcome.planned - len(outcome.results) > 0
    assert "took its process down: no answer within" in outcome.failures[0].violations[0].message
    console = Console(record=True, width=200)
    print_outcome(console, report, None)
    assert f"{outcome.left_out} cases were not run" in console.export_text()


def test_workers_end_with_the_run_that_started_them(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        "import multiprocessing, time\n"
        "from rattention.conformance.workers import end_with_parent\n"
        "def work():\n"
        "    end_with_parent()\n"
        "    print('up', flush=True)\n"
        "    time.sleep(3600)\n"
        "if __name__ == '__main__':\n"
        "    multiprocessing.get_context('spawn').Process(target=work).start()\n"
    )
    run = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE)
    assert run.stdout is not None
    assert run.stdout.readline() == b"up\n"
    run.kill()
    assert run.communicate(timeout=60) == (b"", None)  # the end of the pipe: nobody holds it any more


def test_all_opens_with_a_matrix_and_interpreted_backends_run_at_smoke(tmp_path, monkeypatch):
    from rattention.conformance import backends

    monkeypatch.setattr(backends, "runnable", lambda: (["numpy"], {"far": "far: no such device"}))
    monkeypatch.setattr(backends, "cost", lambda name: "interpreted")
    code, output = call("conform", "all", "--select", "FM-2", "--seed", "3", "--report", tmp_path)
    assert code == 0
    assert output.index("operation x backend") < output.index("All backends")
    assert "rattention conform numpy --profile quick --seed 3" in output
    assert "far: no such device" in output
    assert json.loads((tmp_path / "numpy" / "report.json").read_text())["profile"] == "smoke"
    assert json.loads((tmp_path / "report.json").read_text())["backends"]["numpy"]["conforming"]


def _check_files(report: Path) -> None:
    data = json.loads((report / "report.json").read_text())
    assert {"backend", "conforming", "clauses", "cases", "budget"} <= set(data)
    assert data["conforming"] is False
    assert data["clauses"]["MIX-1"]["status"] == "FAIL"
    assert set(data["clauses"]) == set(load().judged)
    root = ET.parse(report / "junit.xml").getroot()
    assert any(True for _ in root.iter("failure"))
    page = (report / "report.html").read_text()
    assert "MIX-1" in page
    assert "<svg" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
    assert not list(report.glob(".*"))


def test_an_honest_backend_exits_0(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, output = call("conform", "numpy", "--profile", "smoke", "--select", "ROPE", "--seed", "1")
    assert code == 0, output
    assert "CONFORMING" in output
    assert not (tmp_path / "rattention-failures").exists()


@pytest.mark.parametrize(
    ("text", "code"),
    [("raise RuntimeError('no device')", 2), ("backend = 3", 2), ("import a_module_that_is_not_there", 2), ("", 2)],
)
def test_what_does_not_load_exits_2_with_one_line(tmp_path, text, code):
    file = tmp_path / "port.py"
    file.write_text(text)
    found, output = call("conform", f"{file}:backend", "--profile", "smoke")
    assert found == code
    lines = [line for line in output.splitlines() if line.startswith("rattention:")]
    assert len(lines) == 1


@pytest.mark.parametrize("arguments", [("conform", "no-such-backend"), ("conform", "numpy", "--select", "XYZ-9")])
def test_a_wrong_argument_exits_2(arguments):
    assert call(*arguments)[0] == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ("conform", "numpy", "--profile", "smoke", "--select", "ROPE", "--report", ""),
        ("conform", "numpy", "--profile", "smoke", "--select", "ROPE", "--vectors", ""),
        ("mutants", "--select", "always-zero", "--report", ""),
        ("vectors", "export", ""),
        ("vectors", "check", "", "numpy"),
    ],
)
def test_an_empty_name_is_not_the_working_directory(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, output = call(*arguments)
    assert code == 2
    assert "empty" in output
    assert not list(tmp_path.iterdir())


def test_ops_lists_operations_and_clauses():
    code, output = call("ops")
    assert code == 0
    for name in ("rattention_extend", "SWA-1", "WIRE-3"):
        assert name in output


def test_vectors_export_then_check(tmp_path, monkeypatch):
    plan = make_plan("smoke", 0, {"name": "export"})
    few = [r for r in REGISTRY["agreement"].draw(plan) if r.op == "feature_map"][:4]
    monkeypatch.setitem(REGISTRY, "agreement", _with_draw(few))
    assert call("vectors", "export", tmp_path / "set")[0] == 0
    code, output = call("vectors", "check", tmp_path / "set", "numpy")
    assert code == 0
    assert "4 of 4 cases conform" in output


def test_vectors_check_takes_a_folder_and_a_backend_or_a_backend_alone():
    code, output = call("vectors", "check", "numpy")
    assert code == 0
    assert re.search(r"(\d+) of \1 cases conform", output)
    code, output = call("vectors", "check", "one", "two", "numpy")
    assert code == 2
    assert "3 arguments came" in output


def test_the_version_is_that_of_the_package_and_of_the_specification():
    code, output = call("--version")
    assert code == 0
    assert load().version in output


def test_without_the_packages_of_its_extra_the_command_says_what_to_install(monkeypatch, capsys):
    extras = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert {re.split(r"\W", name)[0] for name in extras["conformance"]} == set(entry.NEEDS)
    monkeypatch.setattr(entry.interrupts, "listen", lambda: None)  # Ctrl-C stays with pytest
    monkeypatch.setattr(entry, "find_spec", lambda name: None if name == "rich" else object())
    with pytest.raises(SystemExit) as exit_code:
        entry.main()
    assert exit_code.value.code == 2
    assert capsys.readouterr().err == "rattention: rich not installed: install rattention with its extra conformance\n"


def _with_draw(recipes):
    import dataclasses

    return dataclasses.replace(REGISTRY["agreement"], draw=lambda plan: iter(recipes))


def test_the_same_seed_gives_the_same_cases_and_another_seed_others():
    def cases(seed: int) -> list[bytes]:
        plan = make_plan("smoke", seed, {"name": "x"})
        made = [make_case(REGISTRY[u.property_name], plan, u.recipe) for u in plan_units(plan, Settings("smoke", seed))]
        return [vectors.case_bytes(c) for c in made if c is not None]

    one, again, other = cases(5), cases(5), cases(6)
    assert one == again
    assert one != other


def test_replay_judges_exactly_what_was_stored(tmp_path):
    """Expected values one budget away are right, two budgets away are wrong: the file decides, not a new draw."""
    plan = make_plan("smoke", 0, {"name": "x"})
    recipe = next(r for r in REGISTRY["agreement"].draw(plan) if r.op == "feature_map" and r.feature_map == "softmax")
    case = make_case(REGISTRY["agreement"], plan, recipe)
    assert case is not None
    from rattention.numpy.budget import evaluate

    value, budget = evaluate(case.op, case.tensors, case.attrs)["out"]
    for factor, code in ((0.0, 0), (3.0, 1)):
        case.expected, case.budget = {"out": value + factor * budget}, {"out": np.maximum(budget, 1e-30)}
        vectors.save_case(tmp_path / "case.safetensors", case)
        assert call("replay", tmp_path / "case.safetensors", "numpy")[0] == code
