"""The commands with a port behind the wire: time limits, cases that the runner decides, a bad end."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rattention.conformance import backends, runner, vectors
from rattention.conformance.case import Case
from rattention.conformance.cli import app
from typer.testing import CliRunner

PROGRAM = """
import sys, time
sys.path[:0] = {path!r}
from rattention.conformance.mutants.wire_server import serve
serve({how!r})
"""
X = {"x": np.ones((1, 2, 1, 4), np.float32)}


def call(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    return result.exit_code, " ".join(result.stdout.split()), result.stderr


@pytest.fixture
def command(tmp_path):
    """Factory of what `conform` takes: the eager form behind the wire, with a fault of the catalogue or none."""

    def make(how: str = "") -> str:
        file = tmp_path / "port.py"
        file.write_text(PROGRAM.format(path=sys.path, how=how))
        return "exec:" + shlex.join([sys.executable, str(file)])

    return make


@pytest.fixture
def files(tmp_path):
    """A set of three cases: one for any port, and two that the runner decides for a port that does not validate."""
    folder = tmp_path / "set"
    bad = "feature_map: feature_map: expected one of softmax, relu, identity, got 'elu' (ERR-5)"
    params = {"text": bad, "entry": "feature-map", "target": "feature_map"}
    cases = {
        "a": Case("feature_map", X, {}),
        "b": Case("feature_map", X, {}, property_name="strides", params={"layouts": {"x": "reversed"}}),
        "c": Case("feature_map", X, {"feature_map": "elu"}, property_name="bad input", params=params),
    }
    return [vectors.save_case(folder / f"{name}.safetensors", case) for name, case in cases.items()]


def test_the_commands_say_what_the_runner_decides(command, files):
    code, out, _ = call("vectors", "check", files[0].parent, command())
    assert code == 0
    assert "3 of 3 cases conform, 2 of them decided by the runner" in out
    code, out, _ = call("replay", files[1], command())
    assert (code, out.startswith("runner b.safetensors feature_map property strides")) == (0, True), out
    code, out, _ = call("vectors", "check", files[0].parent, "numpy")
    assert (code, out.endswith("3 of 3 cases conform")) == (0, True), out


def test_a_report_counts_them_apart(command, files, tmp_path):
    given = ("--profile", "smoke", "--seed", "1", "--select", "stored vectors", "--vectors", files[0].parent)
    code, out, _ = call("conform", command(), *given, "--workers", "1", "--report", tmp_path / "report")
    assert code == 0
    assert "0 failed, 0 unsupported, 2 decided by the runner" in out
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    stored = report["properties"]["stored vectors"]
    assert (stored["passed"], stored["runner"]) == (1, 2)
    assert report["cases"]["runner"] == 2
    assert report["cases"]["total"] == report["cases"]["passed"] + 2
    assert sum(report["runner"].values()) == 2
    page = (tmp_path / "report" / "report.html").read_text()
    assert "2 decided by the runner" in page
    assert "strides: the runner decides it" in page


def test_a_limit_of_time_is_kept(command, files):
    for arguments in (("replay", files[0]), ("vectors", "check", files[0])):
        code, out, _ = call(*arguments, command("newline"), "--timeout", "1.5")
        assert code == 1
        assert "the port hangs: no answer to 'run' within 1.5 s; what came has no newline at its end: '{" in out
    given = ("--profile", "smoke", "--seed", "1", "--select", "stored vectors", "--vectors", files[0])
    code, out, _ = call("conform", command("newline"), *given, "--workers", "1", "--timeout", "1.5")
    assert code == 1
    assert "within 1.5 s" in out


def test_a_limit_of_time_is_kept_in_a_worker_too(files, tmp_path):
    port = tmp_path / "port.py"
    port.write_text(
        "import time\nfrom rattention.numpy.adapter import NumpyBackend\n"
        "class Port(NumpyBackend):\n    def run(self, *call):\n        time.sleep(600)\n"
    )
    for arguments in (("replay", files[0]), ("vectors", "check", files[0])):
        code, out, _ = call(*arguments, f"{port}:Port", "--timeout", "1.5")
        assert code == 1
        assert "no answer within 1.5 s" in out
        assert call(*arguments, "numpy", "--timeout", "60")[0] == 0


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "1e999", "two", ""])
@pytest.mark.parametrize("arguments", [("conform",), ("replay", "FILE"), ("vectors", "check")])
def test_what_is_no_time_is_refused(arguments, seconds):
    code, _, err = call(*arguments, "numpy", "--timeout", seconds)
    assert code == 2
    assert "no number of seconds above 0" in err


def test_a_bad_end_is_told_beside_the_verdict(command, files):
    code, out, _ = call("replay", files[0], command("status"))
    assert code == 0
    assert "note: at `stop` the port ended with exit status 1, expected exit status 0 (WIRE-4)" in out


def test_the_help_says_how_long_and_how_many():
    for arguments in (("conform",), ("replay",), ("vectors", "check")):
        code, out, _ = call(*arguments, "--help")
        assert code == 0
        assert "--timeout" in out
        assert "default 120, and 60 to start" in out


def test_the_table_over_all_backends_has_a_column_for_the_runner(monkeypatch, tmp_path):
    """A registered backend may be a port behind the wire, too."""
    monkeypatch.chdir(tmp_path)
    program = PROGRAM.format(path=sys.path, how="")
    Path("wired.py").write_text(
        "import sys\nfrom rattention.conformance.wire.client import Port\n"
        f"backend = Port([sys.executable, '-c', {program!r}])\n"
    )
    found = {"numpy": backends.BUILT_IN["numpy"], "wired": f"{tmp_path / 'wired.py'}:backend"}
    monkeypatch.setattr(backends, "registered", lambda: found)  # which no worker would see
    conform = runner.conform
    monkeypatch.setattr(runner, "conform", lambda name, s, **rest: conform(name, replace(s, workers=0), **rest))
    given = ("--profile", "smoke", "--seed", "1", "--select", "strides", "--report", tmp_path / "report")
    code, out, _ = call("conform", "all", *given)
    assert code == 2  # of the port, this property decides nothing
    assert "matches only cases that the runner decides" in out
    code, out, _ = call("conform", "all", *given[:-3], "rms_mix", *given[-2:])
    assert code == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["clauses"]["ERR-1"]["backends"] == {"numpy": "pass", "wired": "runner"}
    assert report["clauses"]["ERR-1"]["status"] == "pass"
    assert f" {report['cases']['runner']} " in out.rpartition("All backends")[2]
    assert " runner " in out.rpartition("All backends")[2]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="signals of Unix")
@pytest.mark.parametrize("how", ["SIGINT", "SIGKILL"])
def test_a_run_that_ends_early_leaves_no_port_behind(how, tmp_path):
    """Not even one that is at work and does not see that its stdin has ended."""
    file = tmp_path / "port.py"
    log = tmp_path / "starts"
    program = PROGRAM.format(path=sys.path, how="").replace(
        "serve('')",
        f"import os; open({str(log)!r}, 'a').write(f'{{os.getpid()}}\\n')\n"
        "import rattention.conformance.mutants.wire_server as w\n"
        "w._run = lambda *_: time.sleep(600)\nserve()",
    )
    file.write_text(program)
    line = [sys.executable, "-m", "rattention.conformance", "conform"]
    line += ["exec:" + shlex.join([sys.executable, str(file)]), "--profile", "smoke", "--workers", "1"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path)}
    run = subprocess.Popen(line, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + 120
        while not (folders := list(tmp_path.glob("rattention-wire-*/1"))):
            assert run.poll() is None, run.communicate()
            assert time.monotonic() < end
            time.sleep(0.1)
        run.send_signal(getattr(signal, how))
        run.communicate(timeout=120)
        pids = [int(pid) for pid in log.read_text().split()]
        while any(map(is_there, pids)) or any(folder.exists() for folder in folders):
            assert time.monotonic() < end
            time.sleep(0.1)
    finally:
        run.kill()


def is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
