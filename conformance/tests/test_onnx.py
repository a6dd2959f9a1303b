"""The outside oracles: ONNX graphs of standard operators agree with the reference within its error budget."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from rattention.conformance import vectors
from rattention.conformance.export import export
from rattention.conformance.judge import compare
from rattention.conformance.oracles.onnx_backend import backend, runtime
from rattention.conformance.properties import REGISTRY
from rattention.conformance.runner import Unit
from rattention.conformance.session import Session
from rattention.conformance.strategies import make_plan
from rattention.numpy import budget
from rattention.spec import SpecError, Unsupported

VECTORS = vectors.list_set(Path(__file__).resolve().parents[2] / "spec" / "vectors")
ENGINES = pytest.mark.parametrize("engine", [backend, runtime], ids=lambda e: e.name)


@ENGINES
def test_agreement(engine):
    """The suite's own smoke cases, every forward operation among them."""
    plan = make_plan("smoke", 11, engine.describe())
    session = Session(engine, engine.describe(), plan)
    statuses: Counter[str] = Counter()
    operations = set()
    for i, recipe in enumerate(REGISTRY["agreement"].draw(plan)):
        if recipe.is_vjp:
            continue
        result = session.run(Unit(i, "agreement", recipe))
        assert result.status != "fail", result.violations[0].message
        statuses[result.status] += 1
        if result.status == "pass":
            operations.add(result.op)
    assert operations == set(engine.describe()["operations"])
    assert statuses["pass"] > statuses["unsupported"]


@ENGINES
@pytest.mark.parametrize("file", VECTORS, ids=lambda file: file.stem)
def test_activations(engine, file):
    case = vectors.load_case(file)
    storage = {str(t.dtype) for t in case.tensors.values()} - {"int32"}
    if case.is_vjp or not storage <= set(engine.dtypes):
        with pytest.raises(Unsupported):
            engine.run(case.op, case.tensors, case.attrs)
        return
    got = engine.run(case.op, case.tensors, case.attrs)
    limits = budget.evaluate(case.op, case.tensors, case.attrs)
    violations, _ = compare(got, {n: (case.expected[n], limits[n][1]) for n in case.expected})
    assert not violations, violations[0].message


@ENGINES
def test_what_onnx_lacks_is_refused(engine):
    x = np.ones((1, 2, 1, 4), np.float32)
    with pytest.raises(Unsupported, match="gradients"):
        engine.run("feature_map.vjp", {"x": x, "d_out": np.ones((1, 2, 1, 8), np.float32)}, {})
    with pytest.raises(Unsupported, match="no tokens"):
        engine.run("feature_map", {"x": x[:, :0]}, {})
    with pytest.raises(SpecError, match="ERR-5"):
        engine.run("feature_map", {"x": x}, {"feature_map": "elu"})


def test_a_wrong_window_is_seen():
    """The comparison bites: the graph of window 4 is not the answer for window 3."""
    case = next(vectors.load_case(f) for f in VECTORS if f.stem == "softmax-branch-w127")
    wrong = backend.run(case.op, case.tensors, {"window": 126})
    limits = budget.evaluate(case.op, case.tensors, case.attrs)
    violations, _ = compare(wrong, {"out": (case.expected["out"], limits["out"][1])})
    assert violations


def test_export_writes_models_of_standard_operators(tmp_path):
    assert export(tmp_path, "smoke", 3) > 0
    files = sorted((tmp_path / "onnx").glob("*.onnx"))
    names = {file.stem.rsplit("-", 1)[0] for file in files}
    assert {"feature_map", "rms_mix", "rope_table", "sliding_window_attention", "residual_linear_attention"} <= names
    assert {"rattention", "rattention_extend"} <= names
    used = set()
    for file in files:
        model = onnx.load(file)
        onnx.checker.check_model(model, full_check=True)
        assert {node.domain for node in model.graph.node} == {""}
        used |= {node.op_type for node in model.graph.node}
    assert {"Attention", "LinearAttention", "RMSNormalization", "RotaryEmbedding"} <= used


@ENGINES
def test_cached_keys_beyond_the_table(engine):
    """ERR-9: a row without a query may hold keys that the rotary table does not reach."""
    rng = np.random.default_rng(3)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    t = {name: draw(2, 1, 1, 2) for name in ("q", "k", "v")}
    t |= {"cache_k": draw(2, 1, 1, 2), "cache_v": draw(2, 1, 1, 2), "cache_state": draw(2, 1, 4, 2)}
    t |= {"swa_weight": draw(1, 2), "rla_weight": draw(1, 2), "rope_cos": draw(2, 1), "rope_sin": draw(2, 1)}
    t |= {"cache_length": np.array([1, 23], np.int32), "lengths": np.array([1, 0], np.int32)}
    attrs = {"window": 1}
    got = engine.run("rattention_extend", t, attrs)
    violations, _ = compare(got, budget.evaluate("rattention_extend", t, attrs))
    assert not violations, violations[0].message
