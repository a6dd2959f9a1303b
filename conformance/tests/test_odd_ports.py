"""Ports that answer what nobody foresaw are judged like others: a fault of theirs is no fault of the suite."""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import faulty_ports as ports
import numpy as np
import pytest
from rattention.conformance import backends
from rattention.conformance.cli import app
from rattention.conformance.properties import REGISTRY, make_case
from rattention.conformance.runner import Settings, plan_units
from rattention.conformance.session import Session, Unit
from rattention.conformance.strategies import make_plan
from rattention.numpy.adapter import backend as honest
from rattention.spec import SpecError, Unsupported
from typer.testing import CliRunner

PORTS = Path(__file__).with_name("faulty_ports.py")


def messages(change, name="agreement", op="feature_map", limit=1, **about) -> list[str]:
    """What the first `limit` cases of a property find wrong."""
    port = ports.Port(change, **about)
    plan = make_plan("smoke", 1, port.describe())
    session, prop = Session(port, port.describe(), plan), REGISTRY[name]
    cases = [make_case(prop, plan, recipe) for recipe in prop.draw(plan) if recipe.op == op]
    chosen = [case for case in cases if case is not None][:limit]
    assert chosen
    return [v.message for case in chosen for v in session.verdict(prop, case)[0]]


class Mute(Exception):
    def __str__(self):
        raise RuntimeError("no words")

    __repr__ = __str__


# ---------------------------------------------------------------------------------------------- refusals


def refuses_other_dtypes(op, t, a):
    if "x" in t and str(t["x"].dtype) not in ("float32", "bfloat16", "float16"):
        raise Unsupported(f"{t['x'].dtype} is no dtype of mine")
    return honest.run(op, t, a)


def test_unsupported_is_no_answer_to_a_dtype_that_nobody_declares():
    found = messages(refuses_other_dtypes, "bad input", limit=100)
    assert found
    assert all("for an invalid call, expected 'feature_map: x: expected dtype" in m for m in found)
    assert any("int32" in m for m in found)


def test_what_is_invalid_and_beyond_the_backend_has_no_one_right_answer():
    def lacks_float16(op, t, a):
        if any(str(t[name].dtype) == "float16" for name in ("q", "k", "v") if name in t):
            raise Unsupported("float16 is not declared")
        return honest.run(op, t, a)

    dtypes = ["float32", "bfloat16"]
    assert not messages(lacks_float16, "bad input", "sliding_window_attention", 100, dtypes=dtypes)


def raising(error):
    def run(op, t, a):
        raise error

    return run


class SilentReason(Unsupported):
    def __init__(self):
        super().__init__("")

    @property
    def reason(self):
        raise RuntimeError("no reason")

    @reason.setter
    def reason(self, value):
        pass

    __str__ = Mute.__str__


@pytest.mark.parametrize("name", ["agreement", "bad input"])
def test_an_exception_without_words_is_a_crash_of_the_port(name):
    (found,) = messages(raising(Mute()), name)
    assert "Mute, whose str() raises RuntimeError" in found


@pytest.mark.parametrize("name", ["agreement", "bad input"])
def test_a_refusal_without_words(name):
    assert "whose str() raises RuntimeError" in messages(raising(SilentReason()), name)[-1]


def test_a_clause_that_is_none():
    clause = cast(str, ["ERR-1"])
    (found,) = messages(raising(SpecError("feature_map", "x", "more", "less", clause=clause)))
    assert found.startswith("a valid call was refused: feature_map: x: expected more, got less")


def test_an_operation_that_is_not_declared_and_ends_the_process():
    (found,) = messages(raising(SystemExit(0)), "description", "rms_mix", operations=["feature_map"])
    text = "operation rms_mix is not declared: expected Unsupported; rms_mix raised SystemExit: 0"
    assert found.startswith(text)


# ---------------------------------------------------------------------------------------------- results


def answering(make):
    def run(op, t, a):
        return make(honest.run(op, t, a))

    return run


class Unreadable(dict):
    def keys(self):
        raise RuntimeError("no keys")

    __iter__ = keys


class Closed(Mapping):
    def __getitem__(self, key):
        raise RuntimeError("no items")

    def __iter__(self):
        yield "out"

    def __len__(self):
        return 1


class Own(np.ndarray):
    def __array_ufunc__(self, *_, **__):
        raise TypeError("no sums here")


def masked(out):
    return {name: np.ma.MaskedArray(np.zeros_like(x), mask=True) for name, x in out.items()}


RESULTS = {
    "names of any kind": (
        lambda out: {**out, (1, 2): 3, None: 4},
        "feature_map returned ['out', (1, 2), None], expect",
    ),
    "a name without words": (lambda out: {**out, Mute(): 3}, "Mute, whose repr() raises RuntimeError"),
    "a dict without keys": (Unreadable, "feature_map returned Unreadable, which cannot be read: RuntimeError: no keys"),
    "a mapping without items": (
        lambda out: Closed(),
        "which cannot be read: RuntimeError: no items (test_odd_ports.py, line",
    ),
    "every element masked": (masked, "feature_map: out is MaskedArray, not a NumPy array"),
    "an array of another class": (
        lambda out: {name: x.view(Own) for name, x in out.items()},
        "feature_map: out is Own, not a NumPy array",
    ),
}


@pytest.mark.parametrize("kind", RESULTS)
def test_an_odd_result(kind):
    make, text = RESULTS[kind]
    (found,) = messages(answering(make))
    assert text in found


def test_a_matrix_is_no_array_either():
    (found,) = messages(answering(lambda out: {name: x.view(np.matrix) for name, x in out.items()}), op="rope_table")
    assert "rope_cos is matrix, not a NumPy array" in found


def test_metadata_of_any_kind():
    def run(op, t, a):
        return ports.Result(dict(honest.run(op, t, a)), path=Mute(), kernels=7)

    (found,) = messages(run, kernels=["fused"])
    assert "kernels are claimed" in found


# ---------------------------------------------------------------------------------------------- describe()


@pytest.mark.parametrize(
    ("about", "text"),
    [
        ({"operations": ["feature_map", ["rms_mix"]]}, "operations holds ['rms_mix'], which"),
        ({"dtypes": ["float32", {}]}, "dtypes holds {}, which"),
        ({"spec_version": Mute()}, "spec_version is or holds (Mute) (Mute, whose repr() raises RuntimeError)"),
        ({"name": Mute()}, "name is or holds (Mute)"),
        ({"operations": 3}, "operations is int: 3"),
        ({"dtypes": 3}, "dtypes is int: 3"),
        ({"capabilities": ["rope", ["x"]]}, "capabilities holds ['x'], which is none of rope, positions, "),
        ({"tile_sizes": {"T": [Mute()], "window": [], "D": []}}, "tile_sizes['T'] must be a list of positive ints"),
        ({"limits": {"D": {"maximum": "x"}}}, "the limit of D has maximum 'x'"),
        ({"limits": {"D": {"max": 3}}}, "the limit of D has the key 'max', expected"),
        ({"limits": {"D": "all"}}, "the limit of D is 'all', expected"),
        ({"limits": {"D": [Mute()]}}, "limits is or holds (Mute)"),
        ({"kernels": 7}, "kernels is int: 7"),
        ({"cost": ["x"]}, "cost is ['x'], expected one of direct"),
        ({Mute(): 3, "cost": "cheap"}, "cost is 'cheap', expected one of direct"),
    ],
)
def test_an_odd_description(about, text):
    port = ports.Port(honest.run)
    port.about = about
    described = backends.describe(port, "port")
    plan, prop = make_plan("smoke", 1, described), REGISTRY["description"]
    session = Session(port, described, plan)
    found = session.run(Unit(0, prop.name, next(iter(prop.draw(plan)))))
    assert [v.message for v in found.violations if text in v.message], found.violations
    json.dumps(described)
    pickle.dumps(plan)
    # And the others are drawn and run as they are for anyone.
    for unit in plan_units(plan, Settings("smoke", 1))[:3]:
        session.run(unit)


@pytest.mark.parametrize(
    ("again", "text"),
    [
        (lambda about: {**about, "more": np.zeros(2)}, "a second call gives another answer"),
        (lambda about: about["more to say"], "a second call raises KeyError: 'more to say'"),
        (lambda about: {**about, "name": "two"}, "a second call gives another answer"),
    ],
)
def test_an_odd_second_description(again, text):
    port = ports.Port(honest.run)
    about = backends.describe(ports.Port(honest.run, more=np.ones(2)), "port")
    prop, plan = REGISTRY["description"], make_plan("smoke", 1, about)
    port.describe = lambda: again(about)
    case = make_case(prop, plan, next(iter(prop.draw(plan))))
    assert case is not None
    (found,) = [v.message for v in Session(port, about, plan).verdict(prop, case)[0]]
    assert found.startswith(f"describe(): {text}")


# ---------------------------------------------------------------------------------------------- processes


def conform(port):
    arguments = ("conform", f"{PORTS}:{port}", "--profile", "smoke", "--select", "FM-2", "--seed", "3")
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    return result.exit_code, result.stdout, result.stderr


def test_a_port_that_interrupts_itself_crashes(tmp_path, monkeypatch, capfd):
    """Ctrl-C does not reach a worker process: what looks like it is the port's."""
    monkeypatch.chdir(tmp_path)
    code, out, err = conform("interrupt")
    assert (code, err) == (1, "")
    assert "NOT CONFORMING" in out
    assert "feature_map raised KeyboardInterrupt: by itself" in out
    assert "Traceback" not in capfd.readouterr().err


def test_what_the_contract_does_not_know_is_left_alone(tmp_path, monkeypatch):
    """`close` is that of the suite's own wire client; a port may mean anything by it, and by `clauses`."""
    monkeypatch.chdir(tmp_path)
    code, out, err = conform("Extras")
    assert (code, err) == (0, ""), out
