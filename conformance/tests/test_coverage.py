"""Which pairs of classes a run holds: all of them in quick, those that matter most in smoke, under any seed."""

from __future__ import annotations

import json

import numpy as np
import pytest
from rattention.conformance import coverage
from rattention.conformance.cli import app
from rattention.conformance.runner import Settings
from rattention.conformance.strategies import Plan, Recipe, build
from rattention.conformance.strategies.classes import CHEAPEST, FAR, apart, factors
from rattention.conformance.strategies.pairs import Pairs
from rattention.spec import SpecError, load, validate
from typer.testing import CliRunner

OPERATIONS = tuple(load().operations)
EVERYTHING = Plan("quick", 0, operations=OPERATIONS)


@pytest.mark.parametrize("seed", [0, 71200012])
def test_quick_holds_every_pair_that_can_meet(seed):
    plan = Plan("quick", seed, operations=OPERATIONS)
    found = coverage.covered(plan, Settings("quick", seed))
    assert not {op: one.missing for op, (one, _) in found.items() if one.missing}
    assert set(found) == set(OPERATIONS)


@pytest.mark.parametrize("seed", [0, 71200012])
def test_smoke_holds_every_class_and_the_pairs_that_matter_most(seed):
    plan = Plan("smoke", seed, operations=OPERATIONS)
    found = coverage.covered(plan, Settings("smoke", seed))
    for one, _ in found.values():
        assert one.asked[0] == one.asked[1] > 0, one.op
        assert not [gap for gap in one.missing if gap[:2] == gap[2:]], one.op
        dtyped = [gap for gap in one.missing if {"dtype", "feature_map"} == {gap[0], gap[2]}]
        assert not dtyped, one.op


@pytest.mark.parametrize("op", OPERATIONS)
def test_a_class_that_is_asked_for_is_drawn(op):
    rng = np.random.default_rng(0)
    for factor in factors(op):
        for name in factor.classes:
            for chance in (CHEAPEST, rng, rng, rng):
                recipe = factor.draw(Recipe(op, B=2, T=6, window=None if op.startswith("ratt") else 1), name, chance)
                if factor.name == "cache" and name in FAR.values():
                    recipe = recipe.with_(window=2)
                assert factor.of(recipe) == name, (factor.name, name, recipe)


@pytest.mark.parametrize("op", OPERATIONS)
def test_recipes_that_complete_pairs_are_valid_calls(op):
    for recipe in Pairs(EVERYTHING, op).complete(np.random.default_rng(3), Recipe(op), lambda a, b: "T" in (a, b)):
        case = build(recipe)
        validate(case.op, case.tensors, case.attrs)


IMPOSSIBLE = ("there is no such window", "an even D", "without a window the cache holds every token", "without slots")


@pytest.mark.parametrize("op", ["sliding_window_attention", "rattention", "rattention_extend"])
def test_pairs_said_to_be_impossible_are(op):
    """Drawn one after the other, in either order, they do not both come out, or the call is refused."""
    tried = 0
    for f in factors(op):
        for g in factors(op):
            for x in f.classes:
                for y in g.classes:
                    if f is g or not any(word in apart(f.name, x, g.name, y) for word in IMPOSSIBLE):
                        continue
                    tried += 1
                    try:
                        recipe = g.draw(f.draw(Recipe(op, B=2), x, CHEAPEST), y, CHEAPEST)
                        if f.of(recipe) != x or g.of(recipe) != y:
                            continue
                        case = build(recipe)
                        validate(case.op, case.tensors, case.attrs)
                    except (SpecError, ValueError, IndexError):
                        continue
                    if "without slots" in apart(f.name, x, g.name, y):
                        assert not case.tensors["cache_k"].size
                        continue
                    if "holds every token" in apart(f.name, x, g.name, y):
                        assert (case.tensors["cache_length"] <= case.tensors["cache_k"].shape[1]).all()
                        continue
                    pytest.fail(f"{f.name} {x} meets {g.name} {y}: {recipe}")
    assert tried


def test_a_hole_is_reported():
    pairs = Pairs(EVERYTHING, "rattention")
    whole = list(pairs.complete(np.random.default_rng(0), Recipe("rattention"), lambda a, b: True))
    assert not pairs.missing().any()
    holed = Pairs(EVERYTHING, "rattention")
    holed.add(r for r in whole if not (r.has("segments") and r.layout == "right"))
    right = holed.number["segments", "right"]
    assert (holed.missing()[right] == holed.can_meet[right]).all()
    assert holed.can_meet[right].any()


def test_a_backend_is_asked_only_for_what_it_declares():
    plan = Plan("quick", 0, operations=("rattention",), dtypes=("float32",), lacking=frozenset({"segments", "scales"}))
    one, _ = coverage.covered(plan, Settings("quick", 0))["rattention"]
    assert not one.missing
    assert one.counts["segments"] == {"none": one.cases}
    assert set(one.counts["dtype"]) == {"float32"}
    assert {"dtype bfloat16", "q_scale given"} <= set(one.undeclared)


def test_the_command_prints_the_table_and_writes_it(tmp_path):
    result = CliRunner().invoke(app, ["coverage", "numpy", "--seed", "4", "--report", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "never drawn" not in result.output
    assert "this profile promises all of them" in result.output
    told = json.loads((tmp_path / "coverage.json").read_text())
    assert told["pairs"][0] == told["pairs"][1] > 10_000
    page = (tmp_path / "coverage.html").read_text()
    assert "rattention_extend.vjp" in page
    assert 'class="drawn"' in page


def test_the_command_names_what_a_compiled_backend_leaves_out():
    pytest.importorskip("jax")
    result = CliRunner().invoke(app, ["coverage", "jax", "--profile", "smoke", "--seed", "4"])
    assert result.exit_code == 0, result.output
    assert "never drawn" in result.output
    assert "no pair is promised" in result.output
