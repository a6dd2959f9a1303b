"""The wire protocol: honest ports pass, and ports that crash, hang or answer garbage fail their case alone."""

import os
import re
import shlex
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from rattention.conformance import backends, vectors
from rattention.conformance.cli import app
from rattention.conformance.context import PortFailure
from rattention.conformance.reporting.files import junit
from rattention.conformance.reporting.summary import matrix, summarise
from rattention.conformance.runner import Settings, conform, plan_units
from rattention.conformance.session import Session
from rattention.conformance.strategies import make_plan
from rattention.conformance.wire import client
from rattention.conformance.wire.client import Port
from rattention.spec import SpecError
from typer.testing import CliRunner

# A port in Python that answers through the reference; MISCHIEF is code run before each answer.
PORT = """
import json, os, sys, time
sys.path[:0] = {path!r}
from rattention.conformance import tensorfile
from rattention.conformance.case import from_json
from rattention.numpy.adapter import backend
from rattention.spec import SpecError, Unsupported

def say(reply):
    sys.stdout.write(json.dumps(reply) + "\\n"); sys.stdout.flush()

count = 0
for line in sys.stdin:
    m = json.loads(line)
    if m["cmd"] == "stop":
        {at_stop}
        break
    if m["cmd"] == "start":
        about = backend.describe()
        about["name"] = "wire test"
        say(dict(reply="describe", protocol=1, describe=about))
        continue
    count += 1
    tensors, _ = tensorfile.read(m["tensors"])
    {mischief}
    try:
        out = backend.run(m["op"], tensors, from_json(m["attrs"]))
    except Unsupported as e:
        say(dict(reply="unsupported", id=m["id"], reason=str(e))); continue
    except SpecError as e:
        fields = dict(operation=e.operation, argument=e.argument, expected=e.expected, got=e.got, clause=e.clause)
        say(dict(reply="error", id=m["id"], message=str(e), spec_error=fields)); continue
    {change}
    tensorfile.write(m["outputs"], out)
    say(dict(reply="result", id=m["id"], metadata=dict(path="recurrent")))
"""


@pytest.fixture
def port(tmp_path):
    """Factory of commands: `port(mischief, change)` writes the program and returns how to start it."""

    def make(mischief: str = "pass", change: str = "pass", at_stop: str = "pass") -> list[str]:
        file = tmp_path / "port.py"
        program = textwrap.dedent(PORT).format(path=sys.path, mischief=mischief, change=change, at_stop=at_stop)
        file.write_text(program)
        return [sys.executable, str(file)]

    return make


X = {"x": np.ones((1, 2, 1, 4), np.float32)}


@pytest.fixture
def opened():
    """Ports that are closed when the test ends."""
    ports: list[Port] = []
    yield ports
    for p in ports:
        p.close()


def test_an_honest_port_answers(port, opened):
    opened.append(p := Port(port()))
    assert p.describe()["name"] == "wire test"
    out = p.run("feature_map", X, {"feature_map": "relu"})
    assert np.array_equal(out["out"][..., :4], X["x"])
    assert out.metadata == {"path": "recurrent"}
    with pytest.raises(SpecError, match="elu"):
        p.run("feature_map", X, {"feature_map": "elu"})


@pytest.mark.parametrize(
    ("mischief", "text", "clause"),
    [
        ("print('what went wrong', file=sys.stderr); os._exit(7)", "exit status 7; stderr: what went wrong", "WIRE-3"),
        ("os.kill(os.getpid(), 11)", "was ended by the signal SIGSEGV", "WIRE-3"),
        ("sys.stdout.write('half'); sys.stdout.flush(); os._exit(0)", "status 0; its last words .* 'half'", "WIRE-3"),
        ("time.sleep(60)", "hangs: no answer to 'run' within 3 s; nothing came", "WIRE-3"),
        (
            "sys.stdout.write(json.dumps(dict(reply='result', id=m['id']))); sys.stdout.flush(); time.sleep(60)",
            r"within 3 s; what came has no newline at its end: '{\"reply\": \"result\", \"id\": 2}'",
            "WIRE-1",
        ),
        ("print('hello there', flush=True); continue", "no JSON", "WIRE-1"),
        ("say(dict(reply='result')); continue", "schema: 'id' is a required property", "WIRE-1"),
        ("say(dict(reply='result', id='7')); continue", 'schema: id: expected integer, got "7"', "WIRE-1"),
        (
            "say(dict(reply='done', id=2)); continue",
            'reply: expected one of describe, result, .*, got "done"',
            "WIRE-1",
        ),
        (
            "say(dict(reply='result', id=m['id'], metadata=dict(kernels='mm'))); continue",
            'metadata/kernels: expected array, got "mm"',
            "WIRE-1",
        ),
        ("sys.stdout.buffer.write(b'\"caf\\xe9\"\\n'); sys.stdout.flush(); continue", "no JSON .*utf-8", "WIRE-1"),
        ("print(); continue", "no JSON", "WIRE-1"),
        ("say(dict(reply='result', id=m['id'] + 1)); continue", "answered request", "WIRE-1"),
        ("say(dict(reply='result', id=m['id'])); continue", "no usable output file", "WIRE-2"),
        ("open(m['outputs'], 'w').write('x'); say(dict(reply='result', id=m['id'])); continue", "usable", "WIRE-2"),
        ("say(dict(reply='error', id=m['id'], message='out of memory')); continue", "out of memory", "BCK-3"),
        ("say(dict(reply='result', id=m['id'], metadata=dict(x=float('nan')))); continue", "NaN is no JSON", "WIRE-1"),
        (
            "print('{\"id\": 0, ' + json.dumps(dict(reply='result', id=m['id']))[1:], flush=True); continue",
            "the key 'id' comes twice",
            "WIRE-1",
        ),
        ("os.mkfifo(m['outputs']); say(dict(reply='result', id=m['id'])); continue", "no regular file", "WIRE-2"),
        ("os.mkdir(m['outputs']); say(dict(reply='result', id=m['id'])); continue", "no regular file", "WIRE-2"),
    ],
)
def test_a_bad_answer_fails_its_case_alone(port, opened, mischief, text, clause):
    first = "if count == 2 and not os.path.exists(__file__ + '.done'):"
    opened.append(p := Port(port(f"{first} open(__file__ + '.done', 'w').close(); {mischief}"), run_seconds=3))
    p.run("feature_map", X, {})
    with pytest.raises(PortFailure, match=text) as failure:
        p.run("feature_map", X, {})
    assert failure.value.clause == clause
    assert p.run("feature_map", X, {})["out"].shape == (1, 2, 1, 8)


def test_metadata_may_have_any_names(port, opened):
    change = "say(dict(reply='result', id=m['id'], metadata=dict(self=1, outputs=2)))"
    opened.append(p := Port(port(change=f"tensorfile.write(m['outputs'], out); {change}; continue")))
    assert p.run("feature_map", X, {}).metadata == {"self": 1, "outputs": 2}


DECLARES_ONE = 'about["operations"] = ["feature_map"]; '


@pytest.mark.parametrize(
    ("mischief", "clause"),
    [
        ("if m['op'] != 'feature_map': say(dict(reply='unsupported', id=m['id'], reason='not yet')); continue", ""),
        ("pass", "BCK-3"),
        ("if m['op'] != 'feature_map': say(dict(reply='error', id=m['id'], message='what?')); continue", "BCK-3"),
    ],
    ids=["refuses", "runs it", "fails"],
)
def test_a_port_refuses_itself_what_it_does_not_declare(port, opened, mischief, clause):
    command = port(mischief)
    file = Path(command[1])
    file.write_text(file.read_text().replace('about["name"]', DECLARES_ONE + 'about["name"]'))
    opened.append(p := Port(command))
    outcome = conform("wire", Settings("smoke", 1, select="description"), backend=p)
    assert outcome.conforming != bool(clause)
    assert {v.clauses[0] for v in outcome.violations()} == ({clause} if clause else set())


@pytest.mark.parametrize(
    ("at_stop", "text"),
    [
        ("sys.exit(3)", "at `stop` the port ended with exit status 3, expected exit status 0"),
        ("raise RuntimeError('too late')", "exit status 1, expected exit status 0; stderr: .*too late"),
        ("os.kill(os.getpid(), 6)", "was ended by the signal SIGABRT"),
        ("print('bye')", "the port answers `stop`, which has no reply: 'bye'"),
        ("sys.stdout.write('bye')", "has no reply: 'bye'"),
        ("continue", "ignores `stop`: 1 s later its process was still there"),
        ("time.sleep(60)", "ignores `stop`"),
    ],
)
def test_how_a_port_ends_is_judged_once(port, opened, at_stop, text):
    opened.append(p := Port(port(at_stop=at_stop)))
    p.stop_seconds = 1
    outcome = conform("wire", Settings("smoke", 1, select="stop"), backend=p)
    assert not outcome.conforming
    (violation,) = outcome.violations()
    assert violation.clauses == ("WIRE-4",)
    assert re.search(text, violation.message, re.DOTALL), violation.message
    # The case that is kept says the same of the same port.
    case = vectors._parse_case(outcome.failures[0].case)
    assert case.property_name == "stop"


def test_a_port_that_stops_well_can_be_started_again(port, opened):
    opened.append(p := Port(port()))
    p.run("feature_map", X, {})
    assert p.stop() == p.stop() == ""
    p.run("feature_map", X, {})
    assert p.starts == 2


def test_a_port_that_is_given_up_still_says_why(port, opened, monkeypatch):
    """Of a port that hangs in every call the later failures are all that a report shows."""
    monkeypatch.setattr(client, "HANGS", 0)
    opened.append(p := Port(port("sys.stdout.write('half'); sys.stdout.flush(); time.sleep(60)"), run_seconds=3))
    with pytest.raises(PortFailure, match=r"hangs: .* no newline at its end: 'half'"):
        p.run("feature_map", X, {})
    with pytest.raises(PortFailure, match=r"given up: the port hung 1 times .* the last time .*hangs: .*'half'"):
        p.run("feature_map", X, {})


def test_a_killed_port_takes_along_what_it_started(port, opened, tmp_path):
    """A port is often started by a shell script, which is what the suite can end."""
    mark = tmp_path / "pid"
    inner = port(f"open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(60)")
    opened.append(p := Port(["sh", "-c", shlex.join(inner) + "; true"], run_seconds=3))
    with pytest.raises(PortFailure, match="hangs"):
        p.run("feature_map", X, {})
    pid = int(mark.read_text())
    end = time.monotonic() + 30
    while _is_there(pid):  # the kernel takes a moment
        assert time.monotonic() < end, "what the shell started is still there"
        time.sleep(0.05)


def _is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("data + b'\\0'", "not fully covered"),
        ("data[:-1]", "not fully covered"),
        ("b'\\0' * 8 + data", "header"),
        ("struct.pack('<Q', n + 1) + data[8 : 8 + n] + b'\\n' + data[8 + n :]", "spaces alone"),
        ("struct.pack('<Q', n + 1) + b' ' + data[8:]", "spaces alone"),
        ("data.replace(b'[0,64]', b'[1,65]') + b'\\0'", "offset"),
        ("data.replace(b'\"out\":', b'\"out\":1,\"out\":').replace(data[:8], struct.pack('<Q', n + 8))", "safetensors"),
    ],
)
def test_a_file_of_outputs_is_whole(port, opened, file, text):
    change = (
        "import struct; data = tensorfile.dump(out); (n,) = struct.unpack('<Q', data[:8]); "
        f"open(m['outputs'], 'wb').write({file}); say(dict(reply='result', id=m['id'])); continue"
    )
    opened.append(p := Port(port(change=change)))
    with pytest.raises(PortFailure, match=text) as failure:
        p.run("feature_map", X, {})
    assert failure.value.clause == "WIRE-2"


@pytest.mark.parametrize("command", ["exec:", "exec:/no/such/program", f"exec:{sys.executable} -c pass"])
def test_a_program_that_does_not_start_cannot_run(command):
    with pytest.raises(backends.CannotRun):
        backends.describe(backends.resolve(command), command)


@pytest.mark.parametrize(
    ("change", "clause"),
    [
        ("out = {k: v[..., :-1] for k, v in out.items()}", "BCK-2"),
        ("out = {k: v * float('nan') for k, v in out.items()}", "NUM-1"),
    ],
)
def test_the_suite_judges_a_port(port, opened, change, clause):
    command = port(change=f"import numpy as np; {change}; out = {{k: np.asarray(v, 'f4') for k, v in out.items()}}")
    opened.append(p := Port(command))
    outcome = conform("wire", Settings("smoke", 1, select="feature_map"), backend=p)
    assert not outcome.conforming
    assert any(clause in v.clauses for v in outcome.violations())


def test_an_honest_port_conforms(port, opened):
    opened.append(p := Port(port()))
    outcome = conform("wire", Settings("smoke", 1, select="rms_mix"), backend=p)
    assert outcome.conforming, [v.message for v in outcome.violations()]
    assert {"WIRE-1", "WIRE-2"} <= {label for r in outcome.results for label in r.clauses}


def test_what_the_runner_decides_is_no_pass_of_the_port(port, opened):
    opened.append(p := Port(port()))
    file = Path(p.command[1])
    file.write_text(file.read_text().replace('about["name"]', 'about["validates"] = VALIDATES; about["name"]'))
    for validates in (False, True):
        text = file.read_text().replace("VALIDATES", str(validates))
        file.with_name(f"{validates}.py").write_text(text)
        opened.append(q := Port([sys.executable, str(file.with_name(f"{validates}.py"))]))
        outcome = conform("wire", Settings("smoke", 1, select="rms_mix"), backend=q)
        assert outcome.conforming
        summary = summarise(outcome)
        by = summary["properties"]
        assert by["strides"]["passed"] == 0 < by["strides"]["runner"]
        assert (by["bad input"]["runner"] == 0) == validates
        assert (by["bad input"]["passed"] == 0) != validates
        assert summary["cases"]["runner"] == sum(p["runner"] for p in by.values())
        status = {label: entry["status"] for label, entry in summary["clauses"].items()}
        assert status["NUM-7"] == status["ERR-13"] == "runner"
        assert status["ERR-1"] == status["BCK-5"] == ("pass" if validates else "runner")
        page = junit(outcome, summary).decode()
        assert page.count("the runner decides it") == sum(
            len({(r.op, r.dtype) for r in outcome.results if r.status == "runner" and r.property_name == name})
            for name in by
        )


def test_every_pass_of_a_port_is_an_answer_of_the_port(port, opened):
    """No case that never reached the port counts as its own, whatever property it is of."""
    opened.append(p := Port(port()))
    about = backends.describe(p, "wire")
    plan = make_plan("smoke", 2, about)
    session = Session(p, about, plan)
    for unit in plan_units(plan, Settings("smoke", 2)):
        if unit.recipe.op not in ("feature_map", "rms_mix") or unit.recipe.extra == ("describe",):
            continue
        before = p.requests
        result = session.run(unit)
        asked = p.requests > before
        assert asked if result.status == "pass" else not (asked and result.status == "runner"), (unit, result)


def test_nothing_is_left_to_run_where_the_runner_decides_all(port):
    command = "exec:" + shlex.join(port())
    result = CliRunner().invoke(app, ["conform", command, "--profile", "smoke", "--select", "ERR-5", "--workers", "1"])
    assert result.exit_code == 2
    assert "only cases that the runner decides" in result.stderr


def test_how_many_processes_of_a_port_a_run_starts(port, tmp_path):
    """As docs/conformance.md says: one is asked what it can do, one serves each worker, one is started after `stop`."""
    command = port()
    file = Path(command[1])
    log = tmp_path / "starts"
    file.write_text(f"import os; open({str(log)!r}, 'a').write(f'{{os.getpid()}}\\n')\n" + file.read_text())
    outcome = conform("exec:" + shlex.join(command), Settings("smoke", 1, select="stop", workers=2))
    assert outcome.conforming
    started = log.read_text().split()
    assert len(set(started)) == 4
    assert not any(_is_there(int(pid)) for pid in started)


@pytest.mark.parametrize(("workers", "good"), [(0, 1), (1, 2)])
def test_a_bad_end_after_the_last_call_fails_the_run_once(port, tmp_path, workers, good):
    """The case of `stop` finds nothing, since the processes up to its own end well."""
    log = tmp_path / "starts"
    command = port(
        "if m['op'] != 'rms_mix': say(dict(reply='unsupported', id=m['id'], reason='not yet')); continue",
        at_stop=f"sys.exit(len(open({str(log)!r}).read()) > {good})",
    )
    file = Path(command[1])
    text = file.read_text().replace('about["name"]', 'about["operations"] = ["rms_mix"]; about["name"]')
    file.write_text(f"open({str(log)!r}, 'a').write('x')\n" + text)
    outcome = conform("exec:" + shlex.join(command), Settings("smoke", 1, workers=workers))
    assert [r.property_name for r in outcome.results if r.status == "fail"] == ["stop"]
    (violation,) = outcome.violations()
    assert violation.clauses == ("WIRE-4",)
    assert violation.message.startswith("at the end of the run: at `stop` the port ended with exit status 1")
    assert [f.property_name for f in outcome.failures] == ["stop"]
    assert {op for op, row in matrix(outcome).items() if "FAIL" in row.values()} == {"rms_mix"}
