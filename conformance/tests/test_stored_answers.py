"""What a case stores is judged, by the property that it names, and what it does not store is evaluated."""

import numpy as np
import pytest
from rattention.conformance import vectors
from rattention.conformance.case import Case
from rattention.conformance.cli import app
from rattention.conformance.properties import REGISTRY, make_case
from rattention.conformance.runner import Settings, conform, plan_units
from rattention.conformance.strategies import make_plan
from rattention.numpy.adapter import backend as honest
from rattention.numpy.budget import evaluate
from typer.testing import CliRunner


def call(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    return result.exit_code, result.stdout


def example(op="rattention"):
    rng = np.random.default_rng(0)
    q = rng.standard_normal((1, 5, 2, 4)).astype(np.float32)
    tensors = {"q": q, "k": q + 1, "v": q - 1}
    if op == "rattention":
        tensors |= {name: np.ones((2, 4), np.float32) for name in ("swa_weight", "rla_weight")}
    attrs = {"window": 1}
    return Case(op, tensors, attrs), evaluate(op, tensors, attrs)


@pytest.mark.parametrize("output", ["out", "final_state"])
@pytest.mark.parametrize("with_budget", [True, False], ids=["with its budget", "without a budget"])
def test_one_stored_output_is_judged_beside_those_that_are_not(tmp_path, output, with_budget):
    case, bounds = example()
    value, budget = bounds[output]
    for shift, code in ((0, 0), (3, 1)):
        case.expected = {output: value + shift * budget}
        case.budget = {output: budget} if with_budget else {}
        file = vectors.save_case(tmp_path / "case", case)
        found, out = call("replay", file, "numpy")
        assert found == code, out
        assert call("vectors", "check", file, "numpy")[0] == code
        assert (f"{output}: error up to" in out) == bool(code)


def test_outputs_that_are_not_stored_are_judged_by_the_reference(tmp_path):
    case, bounds = example()
    case.expected, case.budget = {"out": bounds["out"][0]}, {"out": bounds["out"][1]}
    file = vectors.save_case(tmp_path / "case.safetensors", case)
    port = tmp_path / "port.py"
    port.write_text(
        "from rattention.numpy.adapter import NumpyBackend\n"
        "class Port(NumpyBackend):\n"
        "    def run(self, op, t, a):\n"
        "        out = super().run(op, t, a)\n"
        "        return out | {'final_state': out['final_state'] * 2}\n"
    )
    code, out = call("replay", file, f"{port}:Port")
    assert code == 1
    assert "final_state" in out


def test_a_stored_budget_is_used_without_an_expected_value(tmp_path):
    case, bounds = example()
    case.budget = {"out": np.zeros_like(bounds["out"][1])}
    assert call("replay", vectors.save_case(tmp_path / "case", case), "numpy")[0] == 1
    case.budget = {"out": bounds["out"][1]}
    assert call("replay", vectors.save_case(tmp_path / "case", case), "numpy")[0] == 0


def of(name: str) -> Case:
    """A small case of a property, which the honest reference passes."""
    plan = make_plan("smoke", 4, honest.describe())
    made = (make_case(REGISTRY[name], plan, u.recipe) for u in plan_units(plan, Settings("smoke", 4)) if
            u.property_name == name)  # fmt: skip
    return next(case for case in made if case is not None and case.tensors)


@pytest.mark.parametrize("name", ["bad input", "NaN surfaces", "membership", "splits"])
def test_a_run_judges_a_stored_case_by_the_property_that_it_names(name, tmp_path):
    file = vectors.save_case(tmp_path / "case.safetensors", of(name))
    settings = Settings("smoke", 1, select="stored vectors", vectors=(str(file),))
    assert conform("numpy", settings, backend=honest).conforming

    class Wrong:
        describe = honest.describe

        def run(self, op, tensors, attrs):
            try:
                out = honest.run(op, tensors, attrs)
            except ValueError as error:
                raise RuntimeError("in words of its own") from error
            return {k: np.nan_to_num(np.ones_like(x)) if x.dtype.kind != "i" else x for k, x in out.items()}

    outcome = conform("wrong", settings, backend=Wrong())
    assert [r.property_name for r in outcome.results if r.status == "fail"] == ["stored vectors"]
    again = vectors._parse_case(outcome.failures[0].case)
    assert again.property_name == name


def test_the_case_of_a_failure_keeps_what_was_stored(tmp_path):
    case, bounds = example()
    case.expected = {"out": bounds["out"][0] + 1}
    file = vectors.save_case(tmp_path / "case.safetensors", case)
    settings = Settings("smoke", 1, select="stored vectors", vectors=(str(file),))
    outcome = conform("numpy", settings, backend=honest)
    assert not outcome.conforming
    again = tmp_path / "again.safetensors"
    again.write_bytes(outcome.failures[0].case)
    np.testing.assert_array_equal(vectors.load_case(again).expected["out"], case.expected["out"])
    assert call("replay", again, "numpy")[0] == 1


def test_smoke_runs_every_case_that_it_is_given(tmp_path):
    case, _ = example("sliding_window_attention")
    for number in range(7):
        vectors.save_case(tmp_path / f"{number}.safetensors", case)
    settings = Settings("smoke", 1, select="stored vectors", vectors=(str(tmp_path),))
    outcome = conform("numpy", settings, backend=honest)
    assert sum(r.status == "pass" and not r.always for r in outcome.results) == 7


def test_integers_are_stored_as_the_format_says(tmp_path):
    plan = make_plan("smoke", 0, honest.describe())
    recipe = next(r for r in REGISTRY["agreement"].draw(plan) if r.op == "rattention_extend")
    case = make_case(REGISTRY["agreement"], plan, recipe)
    assert case is not None
    case.answer(evaluate(case.op, case.tensors, case.attrs))
    assert {str(x.dtype) for x in case.expected.values()} == {"float64", "int32"}
    assert case.expected["cache_length"].dtype == np.int32
    file = vectors.save_case(tmp_path / "case", case)
    assert call("replay", file, "numpy")[0] == 0
