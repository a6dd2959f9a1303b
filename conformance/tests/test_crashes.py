"""A crash of a backend is called one, and says where it happened, in the report and when it is replayed."""

import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import faulty_ports as ports
import pytest
from rattention.conformance.cli import app
from rattention.conformance.reporting.summary import summarise
from rattention.conformance.runner import Settings, conform
from rattention.conformance.told import LONGEST_TRACE, trace
from typer.testing import CliRunner

PORTS = Path(__file__).with_name("faulty_ports.py")

SMOKE = ("--profile", "smoke", "--seed", "3", "--workers", "1")


def call(*arguments):
    """Exit code and output."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    return result.exit_code, result.output


def crashes(outcome):
    return [v for v in outcome.violations() if v.kind == "crash"]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Output and folder of a run against a port that looks up what is not there."""
    folder = tmp_path_factory.mktemp("crash")
    code, output = call("conform", f"{PORTS}:lookup", *SMOKE, "--select", "FM-2", "--report", folder)
    assert code == 1
    return output, folder


def whole_trace(text: str) -> bool:
    """Whether both frames of the port and both exceptions are there, and no frame of the suite."""
    wanted = ('return {"softmax": "exp", "identity": "copy"}[name]', 'looked_up("relu")', "KeyError: 'relu'",
              "LookupError: no kernel for relu", "direct cause")  # fmt: skip
    return all(part in text for part in wanted) and "context.py" not in text


def test_the_terminal_says_crash_and_where(report):
    output, _ = report
    assert "CRASH  agreement  feature_map" in output
    assert "(faulty_ports.py, line" in output
    assert "in looked_up)" in output
    assert whole_trace(output)
    row = next(line for line in output.splitlines() if "│ feature_map  " in line)
    assert "CRASH" in row
    assert "FAIL" not in row
    verdict = next(line for line in output.splitlines() if line.startswith("NOT CONFORMING"))
    assert "crashed)" in verdict


def test_the_files_say_it_too(report):
    _, folder = report
    data = json.loads((folder / "report.json").read_text())
    assert data["cases"]["crashed"] == data["cases"]["failed"] > 0
    assert "CRASH" in data["matrix"]["feature_map"].values()
    assert all(status != "CRASH" for status in data["matrix"]["rms_mix"].values())
    assert whole_trace(data["failures"][0]["violations"][0]["trace"])
    suites = {s.get("name"): s for s in ET.parse(folder / "junit.xml").getroot()}
    errors = list(suites["agreement"].iter("error"))
    assert len(errors) == int(suites["agreement"].get("errors", 0)) > 0
    assert whole_trace(errors[0].text or "")
    assert not list(suites["agreement"].iter("failure"))
    page = (folder / "report.html").read_text()
    assert "CRASH" in page
    assert "LookupError: no kernel for relu" in page


def test_the_replay_says_it_too(report):
    output, _ = report
    line = next(line for line in output.splitlines() if line.startswith("rattention replay"))
    code, said = call(*line.split()[1:])
    assert code == 1
    assert said.startswith("CRASH  ")
    assert whole_trace(said)


def test_wrong_numbers_do_not_hide_a_crash():
    """Every case of the operation fails, the crashes among them last: they are shown all the same."""

    def both(op, t, a):
        if op == "feature_map" and t["x"].shape[1] > 4:
            raise MemoryError("no room")
        out = dict(ports.honest.run(op, t, a))
        return {n: x + x.dtype.type(1) for n, x in out.items()} if op == "feature_map" else out

    outcome = conform("both", Settings("smoke", 3, select="agreement"), backend=ports.Port(both))
    assert {"crash", "value"} <= {v.kind for f in outcome.failures for v in f.violations if f.op == "feature_map"}
    assert "CRASH" in summarise(outcome)["matrix"]["feature_map"].values()


def test_another_exception_for_bad_input_is_a_crash():
    def brief(op, t, a):
        if "x" not in t and op == "feature_map":
            return t["x"]
        return ports.honest.run(op, t, a)

    outcome = conform("brief", Settings("smoke", 3, select="bad input"), backend=ports.Port(brief))
    found = crashes(outcome)
    assert found
    assert 'return t["x"]' in found[0].trace
    assert "expected SpecError" in found[0].message


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
def test_a_fatal_signal_leaves_the_stack():
    outcome = conform(f"{PORTS}:segv", Settings("smoke", 3, select="FM-2", workers=1))
    text = crashes(outcome)[0].trace
    assert "os.kill(os.getpid(), signal.SIGSEGV)" in text
    assert text.endswith("Fatal Python error: Segmentation fault")
    assert "context.py" not in text


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
def test_a_hang_leaves_the_stack():
    outcome = conform(f"{PORTS}:hang", Settings("smoke", 3, select="feature_map", workers=2, timeout=0.5))
    assert "time.sleep(3600)" in crashes(outcome)[0].trace


def test_a_lost_case_is_in_the_row_of_its_dtype():
    """Recipes of the rotary table have a dtype that the call does not use."""
    from rattention.conformance.session import Unit
    from rattention.conformance.strategies import Recipe
    from rattention.conformance.workers import _lost

    assert _lost(Unit(0, "agreement", Recipe("rope_table", "float16")), "gone", "").dtype == "float32"
    assert _lost(Unit(0, "agreement", Recipe("rms_mix", "float16")), "gone", "").dtype == "float16"


# ---------------------------------------------------------------------------------------------- replay


@pytest.mark.parametrize("port", ["content", "crash", "segv"])
def test_a_port_that_ends_the_process_does_not_end_the_replay(port, report):
    output, _ = report
    line = next(line for line in output.splitlines() if line.startswith("rattention replay"))
    code, said = call("replay", line.split()[2], f"{PORTS}:{port}")
    assert code == 1
    assert said.startswith("CRASH  ")
    assert "took its process down" in said


def test_nor_does_it_end_a_set():
    from rattention.conformance.cli import default_vectors
    from rattention.conformance.vectors import list_set, load_case

    files = list_set(Path(default_vectors()[0]))
    lost = [file for file in files if load_case(file).op == "feature_map"]
    code, said = call("vectors", "check", f"{PORTS}:content")
    assert code == 1
    assert said.count("CRASH  ") == len(lost) > 0
    assert f"{len(files) - len(lost)} of {len(files)} cases conform" in said


# ---------------------------------------------------------------------------------------------- odd exceptions


def caught(raises) -> BaseException:
    try:
        raises()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


class Mute(Exception):
    def __str__(self):
        raise SystemExit(3)

    __repr__ = __str__


class Secret(Mute):
    __notes__ = property(Mute.__str__)  # type: ignore[assignment]


@pytest.mark.parametrize("kind", [Mute, Secret])
def test_an_exception_without_words_has_its_frames(kind):
    def raises():
        raise kind

    text = trace(caught(raises))
    assert "raise kind" in text
    assert kind.__name__ in text.splitlines()[-1]


def test_an_endless_recursion_is_cut():
    def first(n):
        return second(n + 1)

    def second(n):
        return first(n + 1)

    text = trace(caught(lambda: first(0)))
    assert "characters left out" in text
    assert len(text) < LONGEST_TRACE + 100
    assert "RecursionError" in text
