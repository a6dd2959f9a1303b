"""The tables of the README and the docs are those of benchmarks/results."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
from rattention.conformance.backends import BUILT_IN

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def load(monkeypatch):
    """Scripts of benchmarks/ as modules."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


def test_the_pages_show_the_stored_results(load):
    assert load("tables").main(["--check"]) == 0


def test_tables_are_made_of_results(load, tmp_path):
    tables, alarms = load("tables"), load("false_alarms")
    run = {
        "backend": "numpy",
        "profile": "quick",
        "seed": 1,
        "conforming": True,
        "units": 7,
        "seconds": 2.0,
        "shares": {"rms_mix": {"float32": 0.25}},
    }
    alarms.write([run, {**run, "seed": 2, "conforming": False}], tmp_path / "x.json")
    text = tables.false_alarms(json.loads((tmp_path / "x.json").read_text()))
    assert "| `numpy` | quick | 2 | 1 | 14 | 2 | 0.250 |" in text
    cell = {"all": 2.0**-20, "one": None}
    text = tables.sharpness({"seeds": [1, 2], "smallest": {"rms_mix": {"out": {"float32": cell}}}})
    assert "| `rms_mix` | `out` | 9.5e-07 / none |  |  |" in text


def test_the_campaign_of_false_alarms_asks_for_what_it_lacks(load):
    alarms = load("false_alarms")
    every = alarms.missing([], "abc")
    assert len(every) == sum(runs for _, _, runs in alarms.CAMPAIGN)
    assert {name for backends, _, _ in alarms.CAMPAIGN for name in backends} == set(BUILT_IN)
    told = [
        {"backend": name, "profile": profile, "seed": seed, "commit": "abc"}
        for backends, profile, seed in every[3:]
        for name in backends
    ]
    assert [job[:2] for job in alarms.missing(told, "abc")] == [job[:2] for job in every[:3]]
    assert len(alarms.missing(told, "abd")) == len(every)
