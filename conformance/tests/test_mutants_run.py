"""`rattention mutants`: it kills, it names the test, it sees a survivor, and an honest implementation survives it."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from rattention.conformance.cli import app
from rattention.conformance.mutants import CATALOGUE, Mutant, Port, console, coverage
from rattention.conformance.mutants.credits import credits
from rattention.conformance.mutants.runner import Death, Deck, judge, run_mutants
from rattention.conformance.mutants.wire import WirePort
from rattention.conformance.runner import Settings, conform
from rattention.spec import load
from typer.testing import CliRunner

# One or two of every class; the whole catalogue is `make mutants`.
SAMPLE = [
    "window-counts-the-token",
    "far-reads-the-border",
    "past128-token-lost",
    "carried-state-ignored",
    "linear-normalised",
    "heads-tiled-at-three",
    "group-of-eight-spills",
    "softmax-without-maximum",
    "one-softmax-over-both-signs",
    "norm-centres",
    "state-in16-bits",
    "branches-rounded-before-norm",
    "nan-hidden",
    "reruns-differ",
    "rope-interleaved",
    "backward-ignores-the-window",
    "group-sum-in-storage",
    "linear-crosses-segments",
    "initial-state-for-id-one",
    "evicted-tokens-lost",
    "cache-holds-rotated-keys",
    "accepts-err8",
    "inputs-scaled-in-place",
    "always-zero",
    "declares-more-than-it-runs",
    "wire-answers-twice",
]


@pytest.fixture(scope="module")
def deck():
    return Deck("quick", 4)


@pytest.mark.parametrize("name", SAMPLE)
def test_sample_dies_by_a_test_of_its_clauses(deck, name):
    mutant = CATALOGUE[name]
    death = judge(mutant, deck)
    assert death.killed, mutant.title
    assert set(death.clauses) & set(mutant.clauses), death
    assert death.message


def test_honest_form_survives():
    """What the mutants change is right: the whole of smoke has nothing against it, in process and behind the wire."""
    honest = Mutant("honest", "Nothing is wrong.", ("NUM-1",), "rationale: control", "control", Port)
    deck = Deck("smoke", 8)
    death = judge(honest, deck)
    assert not death.killed, death.message
    assert death.cases == len(deck.units)
    port = WirePort()
    try:
        outcome = conform("wire", Settings("smoke", seed=8, select="RLA"), backend=port)
    finally:
        port.close()
    assert outcome.conforming, [f.violations[0].message for f in outcome.failures]


def test_kinds_are_sampled():
    assert len({CATALOGUE[name].kind for name in SAMPLE}) >= 15


def test_command(tmp_path):
    result = CliRunner().invoke(
        app, ["mutants", "--profile", "smoke", "--seed", "3", "--select", "always-", "--report", str(tmp_path)]
    )
    assert result.exit_code == 0, result.output
    told = json.loads((tmp_path / "mutants.json").read_text(encoding="utf-8"))
    assert {m["mutant"] for m in told["mutants"]} == {name for name in CATALOGUE if "always-" in name}
    assert all(m["killed"] and m["test"] for m in told["mutants"])
    assert CliRunner().invoke(app, ["mutants", "--select", "no such mutant"]).exit_code == 2


def test_a_survivor_fails(monkeypatch):
    def survive(profile, seed, chosen, **_):
        return [Death(m.id, cases=7) for m in chosen]

    monkeypatch.setattr(console, "run_mutants", survive)
    result = CliRunner().invoke(app, ["mutants", "--select", "always-", "--seed", "1"])
    assert result.exit_code == 1
    assert "survivor" in result.output


def test_both_ways_rule():
    """A clause without a killed mutant is a hole, and so is one without a passing run."""
    clauses = list(load().judged)
    deaths = [
        Death(m.id, "agreement", "rattention", m.clauses, 1)
        for m in CATALOGUE.values()
        if m.clauses[0] != "SWA-1" and "SWA-1" not in m.clauses
    ]
    passes = {"numpy": Counter({c: 3 for c in clauses if c != "RLA-1"})}
    rows = coverage.clause_rows(deaths, passes)
    assert [row.clause for row in rows] == clauses
    found = coverage.holes(rows)
    assert len(found) == 2
    assert found[0].startswith("SWA-1")
    assert found[1].startswith("RLA-1")
    assert "| SWA-1 |" in coverage.markdown(rows)


def test_same_seed_same_verdicts():
    chosen = [CATALOGUE[name] for name in ("heads-tiled", "window-one-too-wide")]
    one, two = (run_mutants("smoke", 6, chosen) for _ in range(2))
    assert [(d.test, d.cases, d.message) for d in one] == [(d.test, d.cases, d.message) for d in two]


def test_what_counts_for_a_clause_can_break_it(deck):
    """Of each property and each clause that its cases are counted for, one of them fails a mutant of the clause."""
    unearned = [f"{c.property_name}: {c.clause} ({c.cases} cases)" for c in credits(deck) if not c.mutant]
    assert not unearned
