"""The contract as data, and the types of the border: loader, results, errors, the protocol of a backend."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
from rattention.spec import REQUIRED, Backend, Result, SpecError, Unsupported, load

SPEC = load()


def test_loader_reads_once_and_knows_every_companion():
    assert load() is SPEC
    differentiable = {n for n, op in SPEC.operations.items() if any(t.differentiable for t in op.tensors)}
    assert {n.removesuffix(".vjp") for n in SPEC.operations if n.endswith(".vjp")} == {
        n.removesuffix(".vjp") for n in differentiable
    }
    assert "rope_table.vjp" not in SPEC.operations


def test_tensor_names_are_those_of_the_border():
    assert [t.name for t in SPEC.operations["rope_table"].tensors] == ["positions"]
    extend = SPEC.operations["rattention_extend"].tensor
    assert not {"initial_state", "positions", "segment_ids"} & set(extend)
    assert SPEC.operations["rattention"].attribute["window"].default is REQUIRED


def test_bad_inputs_name_known_operations_tensors_attributes_and_clauses():
    ids = [b.id for b in SPEC.bad_inputs]
    assert len(ids) == len(set(ids))
    tensors = {t.name for op in SPEC.operations.values() for t in op.tensors}
    for b in SPEC.bad_inputs:
        assert b.clause in SPEC.clauses
        assert b.on == "*" or set(b.on) <= set(SPEC.operations)
        if b.action != "unknown":
            assert set(b.tensors) <= tensors
        if b.action in ("attribute", "drop_attribute"):
            assert any(b.name in op.attribute for op in SPEC.operations.values())


def test_capabilities_name_optional_tensors_or_the_cache():
    tensors = {t.name for op in SPEC.operations.values() for t in op.tensors}
    for capability, needed in SPEC.capabilities.items():
        assert set(needed) <= tensors, capability
    optional = {t.name for op in SPEC.operations.values() for t in op.tensors if t.optional and t.name[:2] != "d_"}
    assert optional <= {t for needed in SPEC.capabilities.values() for t in needed}
    given = ["q", "k", "v", "rope_cos", "rope_sin", "lengths", "d_out"]
    assert SPEC.needs("rattention_extend.vjp", given) == {"rope", "lengths"}
    assert SPEC.needs("rope_table", ["positions"]) == set()  # its one input, and no option of it
    assert SPEC.needs("rattention", ["positions"]) == {"positions"}


def test_errors_survive_pickling():
    error = SpecError("rattention", "k", "a", "b", "ERR-3")
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(error, ValueError)
    assert str(again) == str(error)
    assert (again.operation, again.argument, again.expected, again.got, again.clause) == (
        "rattention",
        "k",
        "a",
        "b",
        "ERR-3",
    )
    lack = pickle.loads(pickle.dumps(Unsupported("no kernel for D = 48")))
    assert lack.reason == str(lack) == "no kernel for D = 48"


def test_result_is_a_dict_with_metadata():
    result = Result({"out": np.zeros(1)}, path="eager", kernels=["forward"])
    assert set(result) == {"out"}
    assert result.metadata == {"path": "eager", "kernels": ["forward"]}


def test_backend_protocol_is_structural():
    class Port:
        def describe(self) -> dict[str, Any]:
            return {}

        def run(self, op: str, tensors: Any, attrs: Any) -> dict[str, np.ndarray]:
            return {}

    assert isinstance(Port(), Backend)
    assert not isinstance(object(), Backend)
