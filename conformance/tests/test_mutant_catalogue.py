"""The catalogue itself: its unchanged base is right, and every entry says what it is."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from rattention.conformance import vectors
from rattention.conformance.mutants import CATALOGUE, Port
from rattention.numpy import quadratic
from rattention.spec import load

VECTORS = Path(__file__).resolve().parents[2] / "spec" / "vectors"
EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-8, "float16": 2.0**-11}


def call(rng: np.random.Generator, op: str, packed: bool) -> tuple[dict[str, np.ndarray], dict]:
    B, T, Hq, Hkv, D, Dv, w = 2, 13, 4, 2, 6, 5, 3
    size = {"B": B, "T": T, "Hq": Hq, "Hkv": Hkv, "H": Hq, "D": D, "Dv": Dv, "F": 2 * D, "D/2": 3, "M": 40, "W": w}
    size["Wnext"] = w
    tensors = {}
    for t in load().operations[op].tensors:
        if t.name in ("segment_ids", "positions") and not packed:
            continue
        shape = tuple(size[s] for s in t.shape)
        tensors[t.name] = rng.standard_normal(shape).astype(np.float32)
        if t.dtype == "int32":
            tensors[t.name] = rng.integers(0, 9, shape, dtype=np.int32)
    if "segment_ids" in tensors:
        tensors["segment_ids"] = np.repeat(np.array([[4, 0, 2], [0, 9, 0]], np.int32), [5, 2, 6], axis=1)
    return tensors, {"window": w} if "window" in load().operations[op].attribute else {}


@pytest.mark.parametrize("op", [o for o in load().operations if not o.startswith("rope_table")])
@pytest.mark.parametrize("packed", [False, True])
def test_the_unchanged_form_is_right(op, packed):
    """A mutant is only as good as what it mutates: the base computes what the reference computes."""
    tensors, attrs = call(np.random.default_rng(5), op, packed)
    expected = quadratic.run(op, tensors, attrs)
    got = Port().run(op, tensors, attrs)
    assert set(got) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=2e-4, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("file", vectors.list_set(VECTORS), ids=lambda f: f.stem)
def test_the_unchanged_form_is_right_on_activations(file):
    case = vectors.load_case(file)
    got = Port().run(case.op, case.tensors, case.attrs)
    for name, value in case.expected.items():
        unit = EPS[str(got[name].dtype)] if name != "cache_length" else 0
        scale = max(1.0, float(np.abs(value).max()))
        assert np.abs(got[name].astype(np.float64) - value).max() <= 2000 * EPS["float32"] * scale + unit * scale


def test_entries_are_complete():
    assert len(CATALOGUE) >= 100
    for mutant in CATALOGUE.values():
        assert mutant.title.endswith("."), mutant.id
        assert mutant.clauses
        assert mutant.source.startswith(("TRAPS ", "rationale: ")), mutant.id
        assert mutant.make() is not mutant.make()
    assert len({m.title for m in CATALOGUE.values()}) == len(CATALOGUE)


def test_every_class_of_fault_is_there():
    kinds = Counter(m.kind for m in CATALOGUE.values())
    wanted = {"window", "state", "heads", "gradient", "decode only", "packed only", "past size", "one dtype"}
    wanted |= {"one head ratio", "structured data", "nan", "bad input", "contract", "lie", "gross"}
    assert wanted <= set(kinds)
    assert min(kinds.values()) >= 3


def test_every_clause_has_a_mutant():
    cited = {label for mutant in CATALOGUE.values() for label in mutant.clauses}
    assert set(load().judged) <= cited
