"""Exit code 1 means "not conforming" and nothing else, however a run ends."""

import contextlib
import errno
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rattention.conformance import runner
from rattention.conformance.cli import app
from rattention.conformance.output import Terminal
from rattention.conformance.reporting.summary import summarise
from rattention.numpy.adapter import backend as honest
from typer.testing import CliRunner

ARGUMENTS = ("--profile", "smoke", "--select", "feature_map", "--seed", "3")


def call(*arguments, **settings):
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False, **settings)
    return result.exit_code, result.stdout, result.stderr


class Interrupted:
    """Answers `calls` calls, from then on Ctrl-C comes."""

    describe = honest.describe

    def __init__(self, calls: int, add: float):
        self.calls, self.add = calls, add

    def run(self, op, tensors, attrs):
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt
        return {name: x + self.add for name, x in honest.run(op, tensors, attrs).items()}


@pytest.mark.parametrize(("add", "code", "verdict"), [(0, 2, "NO VERDICT"), (1, 1, "NOT CONFORMING")])
def test_an_interrupted_run_keeps_what_it_found(add, code, verdict, tmp_path, monkeypatch):
    settings = runner.Settings("smoke", 3, select="feature_map")
    outcome = runner.conform("port", settings, backend=Interrupted(9, add))
    assert 0 < len(outcome.results) < outcome.planned
    assert not outcome.conforming
    assert summarise(outcome)["cases"]["left_out"] == outcome.left_out
    monkeypatch.setattr(runner, "conform", lambda *_, **__: outcome)
    found, out, _ = call("conform", "port", "--profile", "smoke", "--report", tmp_path / "rep")
    assert found == code
    assert verdict in out
    assert "cases were not run: interrupted" in out
    assert json.loads((tmp_path / "rep" / "report.json").read_text())["stopped"] == "interrupted"
    assert "interrupted" in (tmp_path / "rep" / "junit.xml").read_text()
    assert "interrupted" in (tmp_path / "rep" / "report.html").read_text()


def test_a_run_that_found_nothing_leaves_the_last_report(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        runner.conform("port", runner.Settings("smoke", 3), backend=Interrupted(0, 0))

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "conform", interrupted)
    (tmp_path / "report.json").write_text("the last")
    code, _, err = call("conform", "numpy", "--profile", "smoke", "--report", tmp_path)
    assert (code, err) == (2, "rattention: interrupted\n")
    assert (tmp_path / "report.json").read_text() == "the last"


# As below a terminal: a job that a script started in the background ignores Ctrl-C, and so does all below it. Set in
# the run itself and not by `preexec_fn`, which forks this process: JAX, once loaded, warns of every fork.
HEARS_CTRL_C = (
    "import signal, runpy;"
    "signal.signal(signal.SIGINT, signal.default_int_handler);"
    "runpy.run_module('rattention.conformance.cli', run_name='__main__', alter_sys=True)"
)


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="this system has no process groups")
def test_ctrl_c_reaches_the_parent_alone(tmp_path):
    """As a terminal does, to every process of the run, workers included: no traceback of any."""
    port = tmp_path / "port.py"
    port.write_text(
        "import pathlib, time\n"
        "from rattention.numpy.adapter import NumpyBackend\n"
        "class Slow(NumpyBackend):\n"
        "    calls = 0\n"
        "    def run(self, op, t, a):\n"
        "        Slow.calls += 1\n"
        "        if Slow.calls > 20:\n"
        "            pathlib.Path(__file__).with_name('busy').touch()\n"
        "            time.sleep(0.2)\n"
        "        return super().run(op, t, a)\n"
    )
    command = [sys.executable, "-c", HEARS_CTRL_C, "conform", f"{port}:Slow"]
    with open(tmp_path / "out", "wb") as out:
        run = subprocess.Popen(
            [*command, "--profile", "smoke", "--seed", "3", "--workers", "2", "--report", str(tmp_path / "rep")],
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
        try:
            while not (tmp_path / "busy").exists():
                assert run.poll() is None
                with pytest.raises(subprocess.TimeoutExpired):
                    run.wait(0.2)
            os.killpg(run.pid, signal.SIGINT)
            assert run.wait(120) == 2
        finally:  # or the next test is blamed for a process that still runs
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)
            run.wait()
    said = (tmp_path / "out").read_text()
    assert "NO VERDICT" in said
    assert "Traceback" not in said
    assert json.loads((tmp_path / "rep" / "report.json").read_text())["cases"]["passed"] > 0


EXITS = {
    "in describe": "class Port:\n    def describe(self): raise SystemExit(0)\n    def run(self, o, t, a): ...\n",
    "when it is made": "class Port:\n    def __init__(self): raise SystemExit(0)\n    def describe(self): ...\n",
    "when it is loaded": "import sys\nsys.exit(0)\n",
}


@pytest.mark.parametrize("when", EXITS)
def test_a_port_that_ends_the_process_does_not_conform_by_it(when, tmp_path):
    port = tmp_path / "port.py"
    port.write_text(EXITS[when])
    code, out, err = call("conform", f"{port}:Port", *ARGUMENTS)
    assert code == 2
    assert "CONFORMING" not in out
    assert len(err.splitlines()) == 1
    assert "SystemExit" in err


@pytest.mark.parametrize("port", ["exec:", "exec:'", "exec:./no-such-program", "no-such.py:port", ":", "os:path"])
def test_a_port_that_does_not_start_is_told_in_one_line(port):
    code, _, err = call("conform", port, *ARGUMENTS)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert "CannotRun" not in err


def test_a_fault_of_the_suite_is_no_verdict(monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError("of its own")

    monkeypatch.setattr(runner, "conform", broken)
    code, _, err = call("conform", "numpy", *ARGUMENTS)
    assert code == 2
    assert err.splitlines()[-1] == "rattention: the suite itself failed: ZeroDivisionError: of its own"


class Full(io.StringIO):
    def __init__(self, number: int):
        super().__init__()
        self.number = number

    def write(self, text):
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize(("number", "told"), [(errno.ENOSPC, True), (errno.EPIPE, False)])
def test_a_terminal_that_takes_nothing_ends_no_run(number, told, capsys):
    terminal = Terminal(file=Full(number))
    terminal.print("CONFORMING")
    terminal.print("and more")
    said = capsys.readouterr().err
    assert said.count("stdout could not be written") == told


FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize(
    ("stream", "arguments"),
    [
        ("stdout", ("--help",)),
        ("stdout", ("conform", "--help")),
        ("stderr", ("bogus",)),
        ("stderr", ("conform", "bogus")),
        ("stderr", ("vectors",)),
    ],
)
def test_words_of_the_command_line_on_a_full_disk(stream, arguments):
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with FULL.open("w") as full:
        command = [sys.executable, "-m", "rattention.conformance.cli", *arguments]
        found = subprocess.run(command, text=True, check=False, **{**streams, stream: full})
    assert found.returncode == 2
    if stream == "stdout":
        assert found.stderr == "rattention: stdout could not be written: No space left on device\n"


@pytest.mark.parametrize("arguments", [("--help",), ("conform", "--help")])
def test_a_reader_that_leaves_before_the_help(arguments):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "rattention.conformance.cli", *arguments]
    with os.fdopen(write, "w") as gone:
        found = subprocess.run(command, text=True, check=False, stdout=gone, stderr=subprocess.PIPE)
    assert (found.returncode, found.stderr) == (0, "")


def test_a_reader_that_leaves_early_changes_no_exit_code():
    if not Path("/bin/sh").exists():
        pytest.skip("this system has no /bin/sh")
    script = '{ "$0" -m rattention.conformance.cli ops; echo "ended with $?" >&2; } | head -n 1'
    found = subprocess.run(["/bin/sh", "-c", script, sys.executable], capture_output=True, text=True, check=True)
    assert found.stderr == "ended with 0\n"
