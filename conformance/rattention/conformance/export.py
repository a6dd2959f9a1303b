"""Generated cases with the reference's answers, as a set on disk."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from rattention.conformance import vectors
from rattention.conformance.case import Case
from rattention.conformance.oracle import Oracle
from rattention.conformance.properties import REGISTRY, make_case
from rattention.conformance.strategies import make_plan
from rattention.spec import load


def export(folder: Path, profile: str, seed: int) -> int:
    """Write the agreement cases of a profile, and where onnx is installed their graphs; returns how many cases."""
    plan, oracle = make_plan(profile, seed, {"name": "export"}), Oracle()
    prop = REGISTRY["agreement"]
    cases: dict[str, Case] = {}
    for i, recipe in enumerate(prop.draw(plan)):
        case = make_case(prop, plan, recipe)
        if case is None:
            continue
        bounds = oracle.evaluate(case.op, case.tensors, case.attrs)
        case.expected = {name: value for name, (value, _) in bounds.items()}
        case.budget = {name: limit for name, (_, limit) in bounds.items()}
        cases[f"{case.op.replace('.', '-')}-{i:04d}"] = case
    about = {"about": "generated cases with the reference's answers", "spec_version": load().version, "seed": seed}
    vectors.save_set(folder, cases, {**about, "profile": profile})
    if importlib.util.find_spec("onnx"):
        from rattention.conformance.oracles.export import export_graphs

        export_graphs(folder / "onnx", cases.values())
    return len(cases)
