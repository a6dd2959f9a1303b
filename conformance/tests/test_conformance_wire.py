"""The wire protocol: honest ports pass, and ports that crash, hang or answer garbage fail their case alone."""

import sys
import textwrap

import numpy as np
import pytest
from rattention.conformance import backends
from rattention.conformance.context import PortFailure
from rattention.conformance.runner import Settings, conform
from rattention.conformance.wire.client import Port
from rattention.spec import SpecError, Unsupported

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

    def make(mischief: str = "pass", change: str = "pass") -> list[str]:
        file = tmp_path / "port.py"
        file.write_text(textwrap.dedent(PORT).format(path=sys.path, mischief=mischief, change=change))
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
        ("time.sleep(60)", "hangs", "WIRE-3"),
        ("print('hello there', flush=True); continue", "no JSON", "WIRE-1"),
        ("say(dict(reply='result')); continue", "schema", "WIRE-1"),
        ("say(dict(reply='result', id=m['id'] + 1)); continue", "answered request", "WIRE-1"),
        ("say(dict(reply='result', id=m['id'])); continue", "no usable output file", "WIRE-2"),
        ("open(m['outputs'], 'w').write('x'); say(dict(reply='result', id=m['id'])); continue", "usable", "WIRE-2"),
        ("say(dict(reply='error', id=m['id'], message='out of memory')); continue", "out of memory", "WIRE-3"),
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


def test_an_undeclared_operation_is_refused_by_the_client(port, opened):
    opened.append(p := Port(port()))
    p.describe()
    assert p.about is not None
    p.about["operations"] = ["feature_map"]
    with pytest.raises(Unsupported):
        p.run("rope_table", {"positions": np.zeros(1, np.int32)}, {"head_dim": 2})


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
