"""A log, where no terminal shows a bar, says when each backend begins and ends; nothing is left behind by its port."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rattention.conformance import backends
from rattention.conformance.cli import app
from rattention.conformance.reporting import progress, steps
from rich.console import Console
from typer.testing import CliRunner

PORTS = Path(__file__).with_name("faulty_ports.py")
POSIX = pytest.mark.skipif(os.name != "posix", reason="signals and process groups of POSIX")


def call(*arguments):
    """Exit code and lines of output."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    return result.exit_code, result.output.splitlines()


def test_every_backend_begins_and_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(backends, "runnable", lambda: (["numpy", "gone:x", f"{PORTS}:zero"], {}))
    monkeypatch.setattr(backends, "cost", lambda name: "direct")
    code, lines = call("conform", "all", "--select", "FM-2", "--seed", "3", "--profile", "smoke", "--report", tmp_path)
    assert code == 1
    zero = re.escape(f"{PORTS}:zero")
    about = "begins: profile smoke, seed 3, [0-9]+ cases, of which --select FM-2 takes its own"
    wanted = [
        "backends that run here: numpy, gone:x, .*",
        f"numpy {about}",
        "numpy ends: conforming, [0-9]+ passed, 0 failed, 0 unsupported, [0-9.]+ s",
        "gone:x could not run: gone:x does not load: .*",
        f"{zero} {about}",
        f"{zero} ends: not conforming, [0-9]+ passed, [1-9][0-9]* failed, 0 unsupported, [0-9.]+ s",
    ]
    found = [next(n for n, line in enumerate(lines) if re.fullmatch(pattern, line)) for pattern in wanted]
    assert found == sorted(found)
    assert found[-1] < next(n for n, line in enumerate(lines) if "operation x backend" in line)


def test_mutants_begin_and_end():
    code, lines = call("mutants", "--profile", "smoke", "--select", "window-looks-ahead")
    assert code == 0
    assert re.fullmatch(r"mutants begins: profile smoke, seed \d+, 1 mutants", lines[0])
    assert re.fullmatch(r"mutants ends: 1 of 1 killed, 0 survived, [0-9.]+ s", lines[1])


def told(terminal: bool, every: float, monkeypatch) -> str:
    monkeypatch.setattr(progress, "EVERY", every)
    console = Console(force_terminal=terminal, record=True, width=100, file=open(os.devnull, "w"))  # noqa: SIM115
    with contextlib.closing(console.file), steps(console, "port", "profile smoke") as step:
        for done in range(4):
            step(done, 3, done // 3)
        step.line("ends")
    return console.export_text()


def test_a_long_run_is_seen_to_be_alive(monkeypatch):
    begin, *rest, end = told(False, -1.0, monkeypatch).splitlines()
    assert (begin, end) == ("port begins: profile smoke, 3 cases", "port ends")
    assert rest == ["port 1 of 3 cases", "port 2 of 3 cases", "port 3 of 3 cases, 1 failed"]
    assert told(False, 60.0, monkeypatch).splitlines() == [begin, end]


def test_a_terminal_has_a_bar_and_no_lines(monkeypatch):
    assert "begins" not in told(True, -1.0, monkeypatch)


# ---------------------------------------------------------------------------------------------- nothing left behind

SLEEPER = """
import json, os, pathlib, sys, time
from rattention.numpy.adapter import backend
for line in sys.stdin:
    if json.loads(line)["cmd"] == "start":
        print(json.dumps({"reply": "describe", "protocol": 1, "describe": backend.describe()}), flush=True)
    else:
        (pathlib.Path(sys.argv[1]) / str(os.getpid())).touch()
        time.sleep(3600)
"""

# As below a terminal: a job that a script started in the background ignores Ctrl-C.
HEARS_CTRL_C = (
    "import runpy, signal\n"
    "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "runpy.run_module('rattention.conformance', run_name='__main__', alter_sys=True)\n"
)


@pytest.mark.parametrize("command", ["false", "/bin/cat", "./no-such-program"])
@pytest.mark.parametrize("verb", [("conform",), ("vectors", "check")])
def test_a_port_that_does_not_start_leaves_no_folder(command, verb, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert call(*verb, f"exec:{command}")[0] == 2
    assert list(tmp_path.iterdir()) == []


@POSIX
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_the_end_of_a_run_is_the_end_of_a_port_that_hangs(how, tmp_path):
    (tmp_path / "port.py").write_text(SLEEPER)
    (tmp_path / "busy").mkdir()
    (tmp_path / "tmp").mkdir()
    port = f"exec:{sys.executable} {tmp_path / 'port.py'} {tmp_path / 'busy'}"
    command = [sys.executable, "-c", HEARS_CTRL_C, "conform", port, "--profile", "smoke", "--workers", "2"]
    with open(tmp_path / "out", "wb") as out:
        run = subprocess.Popen(command, stdout=out, stderr=out, cwd=tmp_path, start_new_session=True,
                               env={**os.environ, "TMPDIR": str(tmp_path / "tmp")})  # fmt: skip
        try:
            while len(list((tmp_path / "busy").iterdir())) < 2:
                assert run.poll() is None
                time.sleep(0.1)
            if how == signal.SIGINT:
                os.killpg(run.pid, how)
            else:
                run.kill()
            run.wait(120)
            ports = [int(file.name) for file in (tmp_path / "busy").iterdir()]
            end = time.monotonic() + 60
            while any(alive(pid) for pid in ports) and time.monotonic() < end:
                time.sleep(0.1)
            assert not any(alive(pid) for pid in ports)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)
            run.wait()
    said = (tmp_path / "out").read_text()
    assert "Traceback" not in said
    assert not (tmp_path / "rattention-failures").exists() or how == signal.SIGKILL
    if how == signal.SIGINT:
        assert run.returncode == 2
        assert said.endswith("rattention: interrupted\n")
        assert list((tmp_path / "tmp").iterdir()) == []


def alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and waits to be collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        if Path("/proc/self").exists():
            return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False
