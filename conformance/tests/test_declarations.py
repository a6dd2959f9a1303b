"""A description is checked: names are known, what is left out is refused, and no clause of it counts as held."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from rattention.conformance import reporting
from rattention.conformance.case import Case
from rattention.conformance.features import exercised
from rattention.conformance.mutants import CATALOGUE, Port
from rattention.conformance.properties import REGISTRY, make_case
from rattention.conformance.runner import Outcome, Settings, conform, plan_units
from rattention.conformance.session import Session
from rattention.conformance.strategies import Recipe, build, make_plan
from rattention.spec import Unsupported, load

LIES = [
    *("capability-misspelt", "capability-unknown", "operation-misspelt", "cache-not-listed", "limit-of-nothing"),
    *("undeclared-option-runs", "undeclared-positions-run", "undeclared-option-ignored", "undeclared-dtype-runs"),
    *("undeclared-operation-runs", "limit-not-kept", "undeclared-option-crashes"),
]


class Partial(Port):
    """The eager form with less declared, and with everything else refused."""

    def __init__(self, lacking: str = "", **about: Any):
        self.lacking, self.about = lacking, about

    def describe(self):
        about = super().describe()
        return about | {"capabilities": [c for c in about["capabilities"] if c != self.lacking]} | self.about

    def run(self, op, tensors, attrs):
        call = self.check(op, tensors, attrs)
        about: dict[str, Any] = self.describe()
        if op not in about["operations"] or call.storage not in about["dtypes"]:
            raise Unsupported(f"{op} in {call.storage}")
        if self.lacking in load().needs(op, call.given):
            raise Unsupported(f"no {self.lacking}")
        if call.dims.get("D", 1) > about["limits"].get("D", 10**9):
            raise Unsupported("D is too large")
        return super().run(op, tensors, attrs)


def run(backend: Any, select: str = "description") -> Outcome:
    return conform("port", Settings("smoke", 5, select), backend=backend)


@pytest.mark.parametrize("name", LIES)
def test_a_description_that_is_not_kept_fails_in_a_run_of_its_own_plan(name):
    outcome = run(CATALOGUE[name].make())
    labels = [v.clauses[0] for v in outcome.violations()]
    assert labels, name
    assert labels[0] == CATALOGUE[name].clauses[0]
    assert set(labels) <= {"BCK-1", "BCK-3"}


@pytest.mark.parametrize(
    ("lacking", "about", "cases"),
    [
        ("segments", {}, 6),
        ("positions", {}, 4),
        ("", {"dtypes": ["float32"]}, 2 * len(load().operations)),
        ("", {"operations": ["feature_map"]}, len(load().operations) - 1),
        ("", {"limits": {"D": 8}}, 11),
    ],
)
def test_what_is_left_out_is_asked_for_and_its_refusal_passes(lacking, about, cases):
    outcome = run(Partial(lacking, **about))
    assert outcome.conforming, [v.message for v in outcome.violations()]
    assert sum(r.status == "pass" for r in outcome.results) == cases + 1  # and describe() itself


def test_an_unknown_capability_is_named():
    (violation,) = run(CATALOGUE["capability-misspelt"].make()).violations()[:1]
    known = ", ".join(load().capabilities)
    assert violation.message == f"describe(): capabilities holds 'segment', which is none of {known}"


def test_what_runs_undeclared_is_caught_by_every_property():
    outcome = run(CATALOGUE["undeclared-option-runs"].make(), "rattention_extend")
    texts = {v.message for v in outcome.violations()}
    reason = "ran although it is not declared: capability not declared: memory"
    assert {f"rattention_extend {reason}"} <= texts


# ---------------------------------------------------------------------------------------------- under --select


def test_the_description_is_checked_whatever_is_selected():
    outcome = run(CATALOGUE["capability-unknown"].make(), "FM-2")
    assert not outcome.conforming
    assert {v.clauses for v in outcome.violations()} == {("BCK-1",)}


def test_a_selection_without_cases_is_empty_all_the_same():
    outcome = run(Partial(operations=["feature_map"]), "EXT-3")
    assert outcome.empty
    assert not outcome.conforming


# ---------------------------------------------------------------------------------------------- what counts as held

GROUPS = {
    "rope": {"ROPE-3", "ROPE-4", "ROPE-5", "EXT-3", "EXT-8", "SEG-3", "ERR-7", "ERR-9"},
    "positions": set(),
    "segments": {f"SEG-{n}" for n in range(1, 9)} | {"ERR-8"},
    "scales": {"RLA-3"},
    "memory": {"RLA-5", "EXT-11"},
    "initial_state": {"RLA-4", "SEG-6", "SEG-8"},
    "lengths": {"EXT-7", "ERR-10"},
}
"""Clauses about each capability. ERR-9 stands with `rope` since positions need a table."""


@functools.cache
def planned(lacking: str) -> set[str]:
    """Clauses that the cases of a port's own plan are counted for."""
    plan = make_plan("smoke", 3, Partial(lacking).describe())
    found: set[str] = set()
    for unit in plan_units(plan, Settings("smoke", 3)):
        case = make_case(REGISTRY[unit.property_name], plan, unit.recipe)
        found |= set(case.clauses) if case is not None else set()
    return found


WATCHED = {"BCK-4", "WIRE-1", "WIRE-2", "WIRE-3"}
"""Only a port with kernels, or behind the wire, can break these."""


def test_every_clause_is_planned_for_a_whole_port():
    assert set(load().judged) - planned("") == WATCHED


@pytest.mark.parametrize("lacking", GROUPS)
def test_clauses_about_what_is_left_out_are_not_planned(lacking):
    assert planned("") - planned(lacking) == GROUPS[lacking]


def test_clauses_about_what_is_left_out_are_untested_in_the_report():
    table = reporting.summarise(run(Partial("segments"), ""))["clauses"]
    untested = {label for label, entry in table.items() if entry["status"] == "untested"}
    # The case of `stop` is planned for every port, and left out for one in this process.
    assert untested == GROUPS["segments"] | WATCHED | {"WIRE-4"}


def test_one_operation_holds_its_own_clauses_alone():
    about = {"operations": ["feature_map"], "capabilities": []}
    table = reporting.summarise(run(Partial(**about), ""))["clauses"]
    held = {label for label, entry in table.items() if entry["status"] == "pass"}
    assert held <= {f"FM-{n}" for n in range(1, 6)} | {f"NUM-{n}" for n in range(1, 8)} | {
        *(f"ERR-{n}" for n in (1, 2, 3, 4, 5, 12, 13)),
        *("BCK-1", "BCK-2", "BCK-3", "BCK-5"),
    }
    assert {"FM-1", "FM-2", "FM-3", "FM-5", "NUM-4", "BCK-3"} <= held


def test_a_call_that_is_bad_and_undeclared_counts_for_nothing():
    """Its refusal as Unsupported is no wrong answer, and no right one."""

    class Hasty(Partial):
        def run(self, op, tensors, attrs):
            raise Unsupported("nothing today")

    port = Hasty(operations=["feature_map"], dtypes=["float32"])
    plan = make_plan("smoke", 1, port.describe())
    session = Session(port, port.describe() | {"dtypes": ["bfloat16"]}, plan)
    for unit in plan_units(plan, Settings("smoke", 1)):
        if unit.property_name == "bad input":
            assert session.run(unit).status == "skip"


# ---------------------------------------------------------------------------------------------- features of a call


def labels(**changes: Any) -> set[str]:
    return set(clauses_of(build(Recipe("rattention", seed=1, T=6, **changes))))


def clauses_of(case: Case) -> tuple[str, ...]:
    return exercised(case.op, case.tensors, case.attrs)


@pytest.mark.parametrize(
    ("clause", "with_", "without"),
    [
        ("SWA-1", {"window": 2}, {"window": None}),
        ("SWA-2", {"window": 2}, {"window": 0}),  # over one token every softmax is 1
        ("SWA-4", {"Hkv": 2, "G": 2}, {"Hkv": 1, "G": 2}),
        ("RLA-1", {"window": 2}, {"window": 6}),
        ("RLA-4", {"options": ("initial_state",)}, {}),
        ("RLA-8", {"Hkv": 2, "G": 2, "window": 1}, {"Hkv": 2, "G": 1, "window": 1}),
        ("ROPE-5", {"window": 1, "options": ("rope",)}, {"window": None, "options": ("rope",)}),
        ("SEG-1", {"window": 2, "options": ("segments",)}, {"window": 0, "options": ("segments",)}),
        ("SEG-2", {"window": 1, "options": ("segments",)}, {"window": None, "options": ("segments",)}),
        ("SEG-4", {"layout": "middle", "options": ("segments",)}, {"layout": "one", "options": ("segments",)}),
        ("SEG-8", {"layout": "empty", "options": ("segments", "initial_state")}, {"options": ("segments",)}),
    ],
)
def test_a_call_exercises_what_it_could_show_and_no_more(clause, with_, without):
    assert clause in labels(**with_)
    assert clause not in labels(**without)


def test_gradients_of_carried_tensors_need_some():
    recipe = Recipe("rattention.vjp", T=6, window=1, seed=1)
    assert "GRAD-4" not in clauses_of(build(recipe))
    assert "GRAD-4" in clauses_of(build(recipe.with_(options=("initial_state",))))


def test_the_kink_of_relu_needs_a_zero():
    case = build(Recipe("feature_map.vjp", feature_map="relu", seed=1))
    assert "FM-6" not in clauses_of(case)
    case.tensors["x"][0, 0, 0, 0] = 0
    assert "FM-6" in clauses_of(case)


def test_a_cache_without_slots_has_no_order():
    recipe = Recipe("rattention_extend", T=3, window=2, fill="beyond", options=("rope",), seed=1)
    assert {"EXT-3", "EXT-4", "EXT-5"} <= set(clauses_of(build(recipe)))
    assert not {"EXT-3", "EXT-4"} & set(clauses_of(build(recipe.with_(window=-1))))
    whole = build(recipe.with_(fill="empty", window=8))
    assert not {"EXT-5", "EXT-3"} & set(clauses_of(whole))  # nothing leaves the cache, nothing lies in it
    assert np.array_equal(whole.tensors["cache_length"], [0])
